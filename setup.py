"""Builds the extension ahead of time. What is built and how: lstm_ext/native/config.py; all else: pyproject.toml."""

import importlib.util
import os
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("_build_config", ROOT / "lstm_ext" / "native" / "config.py")
config = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = config  # where its dataclass looks for it
spec.loader.exec_module(config)


def build_command(compiler: str, cuda_reason: str | None, built: dict, of_module: set[str]) -> type:
    """The command build_ext. `built`: of the record; `of_module`: the stems of the sources of the Python module."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildAndRecord(BuildExtension):
        """Leaves beside the libraries a record of the torch that they were built for."""

        def finalize_options(self):
            super().finalize_options()
            # torch's headers are no dependencies of the objects: another torch starts with an empty folder.
            self.build_temp += f"-torch{torch.__version__}"
            # The second library is linked with the first. Their sources are compiled in parallel all the same.
            self.parallel = None

        def record_directories(self):
            built = Path(self.build_lib) / "lstm_ext" / "native"
            return [built, ROOT / "lstm_ext" / "native"] if self.inplace else [built]

        def run(self):
            for directory in self.record_directories():
                record = config.read_record(directory)
                if record is None or not {"torch": torch.__version__, **built}.items() <= record.items():
                    self.force = True
                (directory / config.RECORD).unlink(missing_ok=True)
            super().run()
            for directory in self.record_directories():
                digest = config.digest(ROOT / "csrc")
                config.write_record(
                    directory, torch.__version__, compiler, digest, cuda_reason=cuda_reason, **built
                )

        def get_ext_filename(self, ext_name):
            path = Path(super().get_ext_filename(ext_name))
            if ext_name.rpartition(".")[2] == config.OPS_MODULE.rpartition(".")[2]:
                # It belongs to a torch, not to a Python.
                path = path.with_name(config.OPS_LIBRARY)
            return str(path)

        def build_extension(self, ext):
            """The first library compiles the sources of both, so that the last one does not wait for the others."""
            is_module = ext.name == config.MODULE
            compiler, link, compile_ = self.compiler, self.compiler.link_shared_object, self.compiler.compile

            def link_its_own(objects, *args, **kwargs):
                theirs = [x for x in objects if (Path(x).stem in of_module) == is_module]
                self.all_objects = objects
                link(theirs, *args, **kwargs)

            compiler.link_shared_object = link_its_own
            if is_module:
                ext.extra_link_args = config.module_link_flags(self.get_ext_fullpath(config.OPS_MODULE))
                compiler.compile = lambda *args, **kwargs: self.all_objects
            super().build_extension(ext)
            compiler.link_shared_object, compiler.compile = link, compile_

        def get_outputs(self):
            return [*super().get_outputs(), str(Path(self.build_lib) / "lstm_ext" / "native" / config.RECORD)]

    return BuildAndRecord


def extension_arguments() -> dict:
    try:
        import torch
    except ModuleNotFoundError as error:
        sys.exit(f"error: no module named {error.name}: {config.INSTALL_TORCH}.")

    try:
        config.check_torch(torch.__version__)
        config.check_headers()
        command, compiler = config.find_compiler()
        cuda, cuda_reason = config.choose_cuda(torch.version.cuda)
        sets = config.cpu_sets()
        kernels, operators, module_sources = config.split_sources(
            ROOT / "csrc", cuda is not None, sets, ROOT / "build"
        )
    except config.BuildError as error:
        sys.exit(f"error: {error} (LSTM_EXT_SKIP_BUILD=1 installs without the compiled extension.)")
    if (untested := config.untested(torch.__version__)) is not None:
        print(f"warning: {untested}", file=sys.stderr)
    if cuda_reason and torch.version.cuda:
        print(f"warning: the extension is built without CUDA kernels: {cuda_reason}", file=sys.stderr)
    os.environ.setdefault("CXX", command)
    os.environ["PATH"] = config.search_path()
    if cuda:
        # Read when cpp_extension is imported.
        os.environ |= {"CUDA_HOME": str(cuda.home), "TORCH_CUDA_ARCH_LIST": cuda.architectures}
    try:
        from torch.utils.cpp_extension import CppExtension, include_paths, library_paths
    except ModuleNotFoundError as error:
        sys.exit(f"error: no module named {error.name}: {config.INSTALL_TORCH}.")

    built = {"cuda": str(cuda) if cuda else None, "cpu_sets": ",".join(sets)}
    device = "cuda" if cuda else "cpu"

    def extension(name, sources, compile_flags, link_flags):
        # As system headers, so that our warnings are about our code.
        header_dirs = [*include_paths(device), *(cuda.header_dirs if cuda else ())]
        return CppExtension(
            name,
            [str(path.relative_to(ROOT)) for path in sources],
            include_dirs=[str(ROOT / "csrc")],
            library_dirs=library_paths(device),
            extra_compile_args={
                "cxx": [*compile_flags, *(f"-isystem{path}" for path in header_dirs)],
                "nvcc": [*config.NVCC_FLAGS, *(cuda.nvcc_flags if cuda else ())],
            },
            extra_link_args=link_flags,
            depends=[
                str(path.relative_to(ROOT))
                for kind in config.SOURCE_KINDS
                for path in (ROOT / "csrc").rglob(f"*.{kind}")
            ],
        )

    all_sources, flags = [*kernels, *operators, *module_sources], config.compile_flags(cuda)
    link_flags = config.ops_link_flags(config.OPS_LIBRARY)
    if cuda:
        link_flags += config.runtime_flags(cuda, ROOT / "build" / "cudart")
    ops = extension(config.OPS_MODULE, all_sources, flags, link_flags)
    ops.libraries.remove("torch_python")
    if cuda:
        ops.libraries += ["cudart", "c10_cuda", "torch_cuda"]
    # It is linked in build_extension, when it is known where ops is.
    module = extension(config.MODULE, all_sources, flags, [])
    of_module = {path.stem for path in module_sources}
    return {
        "ext_modules": [ops, module],
        "cmdclass": {"build_ext": build_command(compiler, cuda_reason, built, of_module)},
    }


if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"error: setuptools {setuptools.__version__} is too old: `pip install 'setuptools>=77'`.")

try:
    skip = config.chosen("LSTM_EXT_SKIP_BUILD", "0") == "1"
except ValueError as error:
    sys.exit(f"error: {error}")
skip = skip or not config.is_supported_platform() or bool({"sdist", "clean"} & set(sys.argv))
setuptools.setup(**({} if skip else extension_arguments()))
