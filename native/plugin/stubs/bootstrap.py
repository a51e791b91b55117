# ruff: noqa: ANN001, ANN202, ANN204, D100, D101
# Stands in for importlib._bootstrap: imports built-in and frozen modules, and knows no finders, loaders or paths.
# import.c of CPython 3.11 and 3.13 calls _install, _install_external_importers, _find_and_load, _handle_fromlist and
# _lock_unlock_module, and reads __spec__._initializing. There is one thread, so there are no locks.


class ModuleSpec:
    def __init__(self, name, loader, is_package):
        self.name = name
        self.loader = loader
        self.origin = None
        self.loader_state = None
        self.submodule_search_locations = [] if is_package else None
        self.parent = name if is_package else name.rpartition(".")[0]
        self.cached = None
        self.has_location = False
        self._initializing = False
        self._uninitialized_submodules = []


class BuiltinImporter:
    pass


class FrozenImporter:
    pass


def _enter(module, spec):
    module.__spec__ = spec
    module.__loader__ = spec.loader
    module.__package__ = spec.parent
    sys.modules[spec.name] = module


def _load(name):
    if _imp.is_builtin(name):
        spec = ModuleSpec(name, BuiltinImporter, False)
        module = _imp.create_builtin(spec)
        _enter(module, spec)
        _imp.exec_builtin(module)
        return module
    found = _imp.find_frozen(name)
    if found is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    is_package = found[1]
    spec = ModuleSpec(name, FrozenImporter, is_package)
    module = Module(name)
    _enter(module, spec)
    if is_package:
        module.__path__ = []
    spec._initializing = True
    try:
        exec(_imp.get_frozen_object(name), module.__dict__)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    spec._initializing = False
    return module


def _find_and_load(name, import_):
    module = sys.modules.get(name)
    if module is not None:
        return module
    parent, _, child = name.rpartition(".")
    if not parent:
        return _load(name)
    package = _find_and_load(parent, import_)
    module = sys.modules.get(name) or _load(name)
    setattr(package, child, module)
    return module


def _handle_fromlist(module, fromlist, import_, *, recursive=False):
    for name in fromlist:
        if name != "*" and not hasattr(module, name):
            try:
                _find_and_load(f"{module.__name__}.{name}", import_)
            except ModuleNotFoundError:
                pass  # the caller says that it cannot import the name
    return module


def _lock_unlock_module(name):
    pass


def _install(sys_module, imp_module):
    global sys, _imp, Module
    sys = sys_module
    _imp = imp_module
    Module = type(sys)
    sys.meta_path = []


def _install_external_importers():
    pass
