package pkcs11

import (
	"debug/elf"
	"errors"
	"fmt"
	"runtime"
	"strings"

	ck "github.com/miekg/pkcs11"
)

// needed are the functions of a module that a token cannot be used without, by their place in CK_FUNCTION_LIST.
var needed = map[int]string{
	0: "C_Initialize", 1: "C_Finalize", 4: "C_GetSlotList", 6: "C_GetTokenInfo", 12: "C_OpenSession", 13: "C_CloseSession",
	15: "C_GetSessionInfo", 18: "C_Login", 24: "C_GetAttributeValue", 26: "C_FindObjectsInit", 27: "C_FindObjects",
	28: "C_FindObjectsFinal", 42: "C_SignInit", 43: "C_Sign",
}

// machines are the ELF machines of the platforms that Go names.
var machines = map[string]elf.Machine{
	"386": elf.EM_386, "amd64": elf.EM_X86_64, "arm": elf.EM_ARM, "arm64": elf.EM_AARCH64, "loong64": elf.EM_LOONGARCH,
	"ppc64le": elf.EM_PPC64, "riscv64": elf.EM_RISCV, "s390x": elf.EM_S390,
}

// load opens the module at path. Its errors are ErrModule and say what to install.
func load(path string) (*ck.Ctx, functions, error) {
	if runtime.GOOS == "linux" {
		if err := checkELF(path); err != nil {
			return nil, functions{}, fmt.Errorf("%w: %s: %w", ErrModule, path, err)
		}
	}
	ctx, fns, err := loadFunctions(path)
	if err != nil {
		return nil, functions{}, fmt.Errorf("%w: %s: %w%s", ErrModule, path, err, remedy(err.Error()))
	}
	if missing := fns.missing(); missing != "" {
		return nil, functions{}, fmt.Errorf("%w: %s: its function list lacks %s: it cannot sign; name the token's own PKCS#11 module", ErrModule, path, missing)
	}
	return ctx, fns, nil
}

// checkELF finds what the loader says nothing helpful about.
func checkELF(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		var format *elf.FormatError
		if errors.As(err, &format) || strings.Contains(err.Error(), "EOF") {
			return errors.New("no shared library: name the token's PKCS#11 module, a file that ends in .so")
		}
		return err
	}
	defer f.Close()
	if want, known := machines[runtime.GOARCH]; known && f.Machine != want {
		return fmt.Errorf("built for another architecture (%v, this program is for %v): install the module for %s", f.Machine, want, runtime.GOARCH)
	}
	if f.Type != elf.ET_DYN {
		return errors.New("no shared library but another kind of ELF file: name the token's PKCS#11 module, a file that ends in .so")
	}
	return nil
}

// remedies are what to do about texts of the loader, the more telling ones first.
var remedies = []struct{ part, what string }{
	{"Permission denied", ": the sandbox or the file's mode keeps it from being read"},
	{"wrong ELF class", ": install the module for " + runtime.GOARCH},
	{"undefined symbol", ": it does not fit the libraries of this host; install one version of all that the token's vendor delivers"},
	{"cannot open shared", ": install the library that it names, or set LD_LIBRARY_PATH to its directory"},
	{"no C_GetFunctionList", ": name the token's PKCS#11 module"},
	{"version `", ": it was built for a newer system; install the module for this one"},
	{"cannot map", ": the file is damaged, or the sandbox has too little memory"},
	{"static TLS", ": set GLIBC_TUNABLES=glibc.rtld.optional_static_tls=4096"},
	{"executable stack", ": it wants an executable stack, which this system denies; have the vendor mend it"},
	{"C_GetFunctionList failed", ": look at the module's own configuration and log"},
}

// remedy says what to do about what the loader said.
func remedy(text string) string {
	for _, r := range remedies {
		if strings.Contains(text, r.part) {
			return r.what
		}
	}
	return ""
}
