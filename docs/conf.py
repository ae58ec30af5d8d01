"""How Sphinx builds the documentation: `make docs`.

The pages need nothing from the network, neither when they are built nor when
they are read.
"""

import dataclasses
import importlib.metadata
import inspect
import re

from docutils import nodes
from flax import linen as nn
from sphinx.domains.python import PyObject
from sphinx.util.docutils import SphinxDirective

import resist_jax
from resist_jax.run import fields

project = 'resist_jax'
smartquotes_action = 'qe'  # Two dashes begin an option: they stay.
author = 'the resist_jax authors'
release = importlib.metadata.version('resist_jax')

extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
]
source_suffix = {'.md': 'markdown'}
myst_heading_anchors = 3  # Links such as (faults.md#exit-codes) are checked.

html_theme = 'furo'
html_title = 'resist_jax'
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_static_path = ['static']
html_css_files = ['style.css']
html_theme_options = {
  # System fonts, and no link to a service: the pages can be read offline.
  'top_of_page_buttons': [],
}
pygments_style = 'friendly'

# A name between single backticks links to what it names, where that is public.
default_role = 'py:obj'
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # Fields of a class as a list, not one by one.
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_default_options = {'members': True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72


def skip_member(app, what, name, member, skip, options):
  """Leaves out what another place describes.

  These are the fields of a class, which its docstring describes, and names that
  `resist_jax` exports again, which the page of their package describes.
  """
  del options
  if what == 'class':
    field = type(member).__name__ == '_tuplegetter' or isinstance(member, type)
    return True if field else skip
  rooms = [
    getattr(resist_jax, room, None)
    for room in getattr(resist_jax, '__all__', ())
  ]
  again = any(name in getattr(room, '__all__', ()) for room in rooms)
  return True if again and app.env.docname == 'api/resist_jax' else skip


def shorten(app, what, name, obj, options, signature, returns):
  """Gives classes of fields a signature without types: these follow below."""
  del app, name, options
  fields_of = dataclasses.is_dataclass(obj) or hasattr(obj, '_fields')
  if what != 'class' or not fields_of:
    return signature, returns
  hidden = ('parent', 'name') if issubclass(obj, nn.Module) else ()
  plain = str | int | float | tuple | None
  shown = [
    parameter.replace(
      annotation=parameter.empty,
      default=parameter.default
      if isinstance(parameter.default, plain)
      or parameter.default is parameter.empty
      else ...,
    )
    for parameter in inspect.signature(obj).parameters.values()
    if parameter.name not in hidden
  ]
  text = str(inspect.Signature(shown)).replace('Ellipsis', '...')
  return text, None


def mend_lines(app, what, name, obj, options, lines):
  """Changes lines of a docstring that Sphinx would not show well.

  reStructuredText takes 'S.' for item S of a list. The types of fields name the
  private modules in which other packages define them. A name in the docstring
  of a class is more often an argument than a method of that name.
  """
  del app, name, options
  methods = '|'.join(vars(obj)) if what == 'class' else '-'
  for i, line in enumerate(lines):
    line = re.sub(r'(^\s*|: )([A-Z]\.)(?=\s|$)', r'\1\\\2', line)
    if line.startswith(':vartype'):
      line = re.sub(r'(?<![\w.])(?!resist_jax)(?:\w+\.)+(\w+)', r'\1', line)
    lines[i] = re.sub(rf'(?<!`)`({methods})`(?!`)', r'``\1``', line)


def find_public_name(app, env, node, contnode):
  """Links a name to the one public name that ends with it."""
  del app
  domain, target = env.get_domain('py'), node['reftarget']
  if (
    node.get('refdomain') != 'py' or not target.replace('.', '').isidentifier()
  ):
    return None
  found = domain.find_obj(env, None, None, target, node['reftype'], 1)
  if len(found) != 1 or found[0][1].objtype == 'module':
    return None
  node['reftarget'] = found[0][0]
  return domain.resolve_xref(
    env,
    node['refdoc'],
    env.app.builder,
    node['reftype'],
    found[0][0],
    node,
    contnode,
  )


class ConfigFields(SphinxDirective):
  """Lists the fields of a config, a section for each heading."""

  def run(self) -> list[nodes.Node]:
    """Returns the sections."""
    found = []
    for heading, listed in fields.FIELDS.items():
      section = nodes.section(ids=[nodes.make_id(heading)], names=[heading])
      section += nodes.title(text=heading)
      for field in listed:
        section += nodes.definition_list(
          '',
          nodes.definition_list_item(
            '',
            nodes.term('', '', nodes.literal(text=_typed(field))),
            nodes.definition('', nodes.paragraph(text=field.reason)),
          ),
        )
      found.append(section)
    return found


def _typed(field: fields.Field) -> str:
  default = field.default if field.default != '' else "''"
  return f'{field.name} = {default}'


def setup(app) -> None:
  """Connects what this file adds to Sphinx."""
  for field in PyObject.doc_field_types:
    if field.name == 'variable':
      field.label = 'Attributes'
  app.add_directive('config-fields', ConfigFields)
  app.connect('autodoc-skip-member', skip_member)
  app.connect('autodoc-process-signature', shorten)
  app.connect('autodoc-process-docstring', mend_lines, priority=900)
  app.connect('missing-reference', find_public_name)
