//! Compares the table of `main.c`'s operations with the recorded reference and with its page in
//! docs/.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use kvm_ops::{
    Arc, Error, Exit, Fate, GuestDebug, Hpa, Kick, LINUX_7_3, MAIN_C, OpName, Result, TableRoot,
    VcpuId, VcpuOps,
};

/// Reads the reference: per operation its class, and the constant of a class C row.
fn reference() -> BTreeMap<&'static str, (char, &'static str)> {
    include_str!("vectors/ops/main_c.csv")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .skip(1)
        .map(|line| {
            let mut cells = line.split(',');
            let mut cell = || cells.next().expect("three cells and more");
            (cell(), (cell().chars().next().expect("a class"), cell()))
        })
        .collect()
}

#[test]
fn every_operation_of_the_reference_is_in_the_table_with_its_class() {
    let reference = reference();
    assert_eq!(reference.len(), 92);
    let names: BTreeSet<_> = MAIN_C.iter().map(|op| op.name).collect();
    assert_eq!(names.len(), MAIN_C.len(), "no name stands twice");
    for op in MAIN_C {
        let (class, _) = reference
            .get(op.name)
            .unwrap_or_else(|| panic!("{} is unknown", op.name));
        assert_eq!(op.class.letter(), *class, "{}", op.name);
    }
    let asked = reference
        .values()
        .filter(|(class, _)| matches!(class, 'B' | 'D'))
        .count();
    assert_eq!(
        (asked, reference.len() - asked),
        (30, 62),
        "as counted in main.c"
    );
}

/// The names of the methods declared in a trait's text.
fn methods(of: &str) -> BTreeSet<String> {
    let text = match of {
        "VmOps" => include_str!("../ops/src/vm_ops.rs"),
        _ => include_str!("../ops/src/vcpu_ops.rs"),
    };
    let from = text.find(&format!("pub trait {of}:")).expect("the trait");
    text[from..]
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("fn "))
        .map(|rest| rest.split('(').next().expect("a name").to_owned())
        .collect()
}

#[test]
fn every_operation_is_a_method_that_exists_or_says_why_it_is_none() {
    let (vm, vcpu) = (methods("VmOps"), methods("VcpuOps"));
    for op in MAIN_C {
        match op.fate {
            Fate::Vm(method) => assert!(vm.contains(method), "{} -> {method}", op.name),
            Fate::Vcpu(method) => assert!(vcpu.contains(method), "{} -> {method}", op.name),
            Fate::Backend(method) => assert_eq!(method, "create_vcpu"),
            Fate::Host(why) | Fate::LeftOut(why) => {
                assert!(why.len() > 20 && !why.ends_with('.'), "{}: {why}", op.name);
            }
        }
    }
}

/// A vCPU whose whole state is protected: it implements only the required methods and its refusal.
struct Protected;

impl VcpuOps for Protected {
    fn id(&self) -> VcpuId {
        VcpuId(0)
    }

    fn vcpu_run(&mut self) -> Result<Exit> {
        Ok(Exit::Shutdown)
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        struct NoKick;
        impl Kick for NoKick {
            fn kick(&self) {}
        }
        Arc::new(NoKick)
    }

    fn vcpu_reset(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn vcpu_free(self) -> Result<()> {
        Ok(())
    }

    fn refusal(&self, operation: &'static OpName) -> Error {
        Error::Protected(operation)
    }
}

/// Calls a method of a protected vCPU and returns its error.
fn error_of(method: &str) -> Option<Error> {
    let mut td = Protected;
    match method {
        "regs" => td.regs().err(),
        "set_regs" => td.set_regs(&Default::default()).err(),
        "sregs" => td.sregs().err(),
        "set_sregs" => td.set_sregs(&Default::default()).err(),
        "events" => td.events().err(),
        "set_events" => td.set_events(&Default::default()).err(),
        "debug_regs" => td.debug_regs().err(),
        "set_debug_regs" => td.set_debug_regs(&Default::default()).err(),
        "msrs" => td.msrs(&mut []).err(),
        "set_msrs" => td.set_msrs(&[]).err(),
        "set_cpuid" => td.set_cpuid(&[]).err(),
        "set_guest_debug" => td.set_guest_debug(GuestDebug::default()).err(),
        "inject_irq" => td.inject_irq(255).err(),
        "inject_nmi" => td.inject_nmi().err(),
        "enable_irq_window" => td.enable_irq_window().err(),
        // SAFETY: a protected vCPU of this test has no tables.
        "load_mmu_pgd" => td
            .load_mmu_pgd(unsafe { TableRoot::new(Hpa::new(0), 4) })
            .err(),
        "write_tsc_offset" => td.write_tsc_offset(1).err(),
        "write_tsc_multiplier" => td.write_tsc_multiplier(1).err(),
        "setup_mce" => td.setup_mce(1).err(),
        other => panic!("{other} is the place of an operation that this test does not call"),
    }
}

/// For a TD, main.c ignores these calls or returns a constant or zeros. Here a caller that asks for
/// protected state gets an error that names the operation: a dropped interrupt, or a register that
/// reads 0, would be a hidden bug.
#[test]
fn protected_state_answers_an_error_by_name_where_main_c_answers_something_fixed() {
    let mut asked = BTreeSet::new();
    for op in MAIN_C {
        let (Fate::Vcpu(method), 'N' | 'C' | 'Z') = (op.fate, op.class.letter()) else {
            continue;
        };
        let error = error_of(method);
        assert!(
            matches!(error, Some(Error::Protected(name)) if name.0 == method),
            "{} -> {method}: {error:?}",
            op.name
        );
        asked.insert(method);
    }
    assert!(asked.len() >= 12, "{asked:?}");
}

/// docs/ops.md as generated from the table.
fn ops_page() -> String {
    let mut page = String::from(
        "# The operations of main.c\n\n\
         Linux `arch/x86/kvm/vmx/main.c` (7.1) wraps 92 operations with \"if it is a TD then tdx, else vmx\". Each is\n\
         listed here: the method that it is in this library, or why an embedder does not need it. The class tells what\n\
         main.c answers for a TD: **B** both back ends are called, **D** the call goes to the TD back end, **N** nothing\n\
         happens, **C** a constant, **Z** zeros, **W** refused. Where main.c answers N, C or Z for the state of a TD, the\n\
         method here answers `Error::Protected` with its name, so that no interrupt is dropped and no register reads 0\n\
         in silence. State is read and written in groups, so one method is the place of several operations.\n\n\
         This page is written by `BLESS=1 cargo test --test main_c`, and the same test compares it.\n\n\
         | operation | class | here |\n|---|---|---|\n",
    );
    for op in MAIN_C {
        let here = match op.fate {
            Fate::Vm(method) => format!("`VmOps::{method}`"),
            Fate::Vcpu(method) => format!("`VcpuOps::{method}`"),
            Fate::Backend(method) => format!("`Backend::{method}`"),
            Fate::Host(why) => format!("host: {why}"),
            Fate::LeftOut(why) => format!("left out: {why}"),
        };
        writeln!(page, "| {} | {} | {here} |", op.name, op.class.letter()).unwrap();
    }
    page.push_str(
        "\n## Linux 7.3\n\n\
         Linux 7.3 has 95 operations. The differences to the table above:\n\n\
         | operation | change | here |\n|---|---|---|\n",
    );
    for change in LINUX_7_3 {
        writeln!(
            page,
            "| {} | {} | {} |",
            change.name, change.change, change.here
        )
        .unwrap();
    }
    page
}

#[test]
fn the_page_of_operations_says_what_the_table_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/ops.md");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, ops_page()).unwrap();
    }
    assert!(
        std::fs::read_to_string(path).unwrap() == ops_page(),
        "docs/ops.md is not what the table says: run `BLESS=1 cargo test --test main_c`"
    );
}
