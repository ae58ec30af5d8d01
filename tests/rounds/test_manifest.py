"""A manifest names the file that is not as it was, and no other."""

from resist_jax.rounds.manifest import check, manifest


def make(folder):
  (folder / 'd').mkdir()
  (folder / 'a').write_bytes(b'first')
  (folder / 'd' / 'b').write_bytes(b'second')
  return manifest(folder)


def test_an_untouched_folder_is_intact_whatever_lies_beside(tmp_path):
  files = make(tmp_path)
  assert list(files) == ['a', 'd/b']
  (tmp_path / 'Thumbs.db').write_bytes(b'of the file manager')
  (tmp_path / 'd' / 'more').mkdir()
  assert check(tmp_path, files) is None


def test_files_of_tools_are_not_listed(tmp_path):
  files = make(tmp_path)
  (tmp_path / 'd' / '.DS_Store').write_bytes(b'of the file manager')
  (tmp_path / '.index').mkdir()
  (tmp_path / '.index' / 'c').write_bytes(b'of the file manager')
  assert manifest(tmp_path) == files


def test_the_file_that_was_changed_or_lost_is_named(tmp_path):
  files = make(tmp_path)
  (tmp_path / 'd' / 'b').write_bytes(b'secone')
  assert check(tmp_path, files) == 'd/b is not as it was written'
  (tmp_path / 'd' / 'b').unlink()
  assert check(tmp_path, files) == 'd/b is missing'
  (tmp_path / 'd' / 'b').mkdir()
  assert check(tmp_path, files) == 'd/b is missing'
