"""What every page must be: one small file that loads nothing."""

import html.parser


class Tags(html.parser.HTMLParser):
  """Collects the tags of a page, and all that it would load."""

  def __init__(self):
    super().__init__()
    self.tags, self.loads = [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    names = 'src', 'srcset', 'data', 'poster', 'xlink:href'
    self.loads += [value for name, value in attrs if name in names]
    if tag in ('link', 'image', 'use', 'iframe', 'object', 'embed'):
      self.loads.append(dict(attrs).get('href', tag))


def check_alone(page):
  """Checks that a page is small, loads nothing and needs no other file."""
  text = page.read_text()
  assert len(text.encode()) < 3e6
  tags = Tags()
  tags.feed(text)
  assert all(x.startswith('data:image/png;base64,') for x in tags.loads)
  for word in ('http:', 'https:', '@import', 'url(', 'fetch(', 'import('):
    assert word not in text, word
  return tags
