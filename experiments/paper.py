"""The results that the paper reports.

C. Dun, C. R. Wolfe, C. M. Jermaine, A. Kyrillidis. ResIST: Layer-Wise
Decomposition of ResNets for Distributed Training. UAI 2022. Accuracies are in
percent: the best test of a run, with the statistics of each test batch.
"""

# Table 2: accuracy by data set, protocol and number of workers.
ACCURACY = {
  'cifar10': {
    'local_sgd': {2: '92.36', 4: '92.90', 8: '92.00'},
    'resist': {2: '91.95 ± 0.32', 4: '92.35 ± 0.22', 8: '91.45 ± 0.30'},
  },
  'cifar100': {
    'local_sgd': {2: '70.67', 4: '71.51', 8: '69.64'},
    'resist': {2: '70.06 ± 0.51', 4: '71.30 ± 0.20', 8: '70.26 ± 0.21'},
  },
}

# Table 3: seconds of training by data set, protocol and number of workers.
SECONDS = {
  'cifar10': {
    'local_sgd': {4: 5486, 8: 10072},
    'resist': {4: 1532, 8: 2671},
  },
  'cifar100': {
    'local_sgd': {4: 5528, 8: 10058},
    'resist': {4: 1545, 8: 2639},
  },
}

# Ablation on CIFAR-10, by number of workers and column. Each column keeps the
# changes of the columns before it.
ABLATION = {
  2: {
    'naive': 66.3,
    'share_strided': 68.3,
    'only_section_3': 84.3,
    'scale': 91.5,
    'pre_activation': 92.0,
    'tuned_l': 92.0,
  },
  8: {'pre_activation': 86.5, 'min_depth': 89.9, 'tuned_l': 91.3},
}

# Final accuracy on CIFAR-100 by protocol and number of workers, and by the
# number of local iterations; 0 stands for workers that never synchronise.
LOCAL_ITERATIONS = {
  ('local_sgd', 2): {
    50: 70.79, 100: 71.10, 250: 70.78, 500: 71.88, 1000: 71.55, 1500: 71.71,
    2000: 71.26, 4000: 69.08, 6000: 67.20, 0: 31.34,
  },
  ('local_sgd', 4): {
    50: 67.95, 100: 67.90, 250: 67.35, 500: 67.24, 1000: 66.92, 1500: 66.62,
    2000: 65.57, 4000: 59.57, 6000: 53.14, 0: 22.10,
  },
  ('resist', 2): {
    50: 70.11, 100: 71.28, 250: 71.36, 500: 70.88, 1000: 71.02, 1500: 71.96,
    2000: 70.93, 4000: 69.77, 6000: 70.24, 0: 40.68,
  },
  ('resist', 4): {
    50: 69.39, 100: 68.84, 250: 68.02, 500: 67.81, 1000: 67.95, 1500: 67.31,
    2000: 66.29, 4000: 65.14, 6000: 54.52, 0: 18.12,
  },
}  # fmt: skip

# By data set, network and number of workers: the accuracies of local SGD and of
# ResIST, and how many times faster ResIST trains.
DEEPER = {
  ('cifar10', '152', 2): (92.27, 92.01, 1.58),
  ('cifar10', '152', 4): (91.39, 90.67, 3.41),
  ('cifar10', '200', 2): (92.31, 92.10, 1.92),
  ('cifar10', '200', 4): (91.35, 90.27, 3.75),
  ('cifar100', '152', 2): (70.50, 70.32, 1.53),
  ('cifar100', '152', 4): (68.39, 67.27, 3.02),
  ('cifar100', '200', 2): (71.05, 70.71, 2.10),
  ('cifar100', '200', 4): (69.05, 67.62, 3.67),
}

# Accuracy of the averaged predictions of sub-ResNets that are never
# synchronised, by data set and number of workers.
ENSEMBLE = {
  'cifar10': {2: 92.27, 4: 92.56, 8: 90.67},
  'cifar100': {2: 72.08, 4: 72.12, 8: 67.98},
}

# Accuracy of ResIST by data set and the bits of each number that is sent.
QUANTISED = {
  'cifar10': {8: 92.14, 7: 92.26, 6: 91.91, 5: 91.35, 4: 76.33},
  'cifar100': {8: 71.38, 7: 72.15, 6: 71.37, 5: 68.29, 4: 40.48},
}
