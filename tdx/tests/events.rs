//! Failures are events that name the technology, the VM, the vCPU, the address, the access, the
//! SEAMCALL and its status, and say what to do.

mod common;
mod run_support;

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use common::life::{create, destroy, initialized, runnable};
use common::{Injected, TestHost};
use kvm_ops_core::guest::Script;
use kvm_ops_core::{Backend, Error, Gfn, Gpa, VcpuId, VcpuOps, VmOps};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::status::Class;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Keeps every event as a line: the level, then `name=value` of each field.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

struct Line<'a>(&'a mut String);

impl Visit for Line<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push_str(&format!(" {}={value:?}", field.name()));
    }
}

impl Subscriber for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = event.metadata().level().to_string();
        event.record(&mut Line(&mut line));
        self.0.lock().unwrap().push(line);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The events of `f` that are at least warnings.
fn events_of(f: impl FnOnce()) -> Vec<String> {
    let lines = Lines::default();
    tracing::subscriber::with_default(lines.clone(), f);
    let all = std::mem::take(&mut *lines.0.lock().unwrap());
    let quiet = [Level::DEBUG, Level::TRACE, Level::INFO].map(|level| level.to_string());
    let loud = |line: &String| !quiet.iter().any(|level| line.starts_with(level));
    all.into_iter().filter(loud).collect()
}

#[track_caller]
fn names(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "no {part} in: {line}");
    }
}

#[test]
fn a_seamcall_that_poisons_is_one_event_with_leaf_status_operand_and_advice() {
    let host = TestHost::new();
    let vm = runnable(&host);
    vm.pre_fault_memory(Gfn::new(7), 1).unwrap();
    let status = Class::EPT_ENTRY_STATE_INCORRECT.with(1).get();
    host.fail(Leaf::MemPageAug, 1, 1, Injected::Status(status));
    let events = events_of(|| {
        let error = vm.pre_fault_memory(Gfn::new(8), 1);
        assert_eq!(error, Err(Error::Firmware(status)));
    });
    assert_eq!(events.len(), 1, "{events:?}");
    names(
        &events[0],
        &[
            "ERROR",
            "technology=\"tdx\"",
            &format!("vm={}", vm.id().0),
            "seamcall=\"TDH.MEM.PAGE.AUG\"",
            "EPT_ENTRY_STATE_INCORRECT",
            &format!("rcx={}", 8 << 12),
            "destroy it",
        ],
    );
    let _ = destroy(vm);
}

#[test]
fn a_failed_creation_and_a_leaked_page_are_events_with_their_consequence() {
    let host = TestHost::new();
    let status = Class::PAGE_METADATA_INCORRECT.with(1).get();
    let mut vm = create(&host);
    host.fail(Leaf::MngAddcx, 2, 1, Injected::Status(status));
    let events = events_of(|| assert!(vm.vm_init().is_err()));
    assert_eq!(events.len(), 1, "{events:?}");
    names(
        &events[0],
        &["TDH.MNG.ADDCX", "PAGE_METADATA_INCORRECT", "undone"],
    );

    let vm = runnable(&host);
    vm.pre_fault_memory(Gfn::new(7), 1).unwrap();
    host.fail(Leaf::PhymemPageReclaim, 1, 1, Injected::Status(status));
    let events = events_of(|| assert_eq!(destroy(vm).pages_leaked(), 2));
    // The page, and the TDR in which the module counts it.
    assert_eq!(events.len(), 2, "{events:?}");
    for event in events {
        names(&event, &["ERROR", "TDH.PHYMEM.PAGE.RECLAIM", "leaked"]);
    }
}

#[test]
fn a_td_that_ends_by_its_own_access_names_vcpu_address_and_access() {
    use run_support::td;
    let (mut td, _transcript) = td(Script::new().read(Gpa::new(0x3000), 1));
    let events = events_of(|| assert_eq!(td.vcpu().vcpu_run(), Err(Error::Poisoned)));
    assert_eq!(events.len(), 1, "{events:?}");
    names(
        &events[0],
        &[
            "vcpu=0",
            "gpa=0x3",
            "access=private",
            "accepted",
            "destroy it",
        ],
    );
    td.destroy();
}

#[test]
fn a_td_that_is_dropped_without_its_teardown_says_so_and_one_that_is_torn_down_does_not() {
    let host = TestHost::new();
    let vm = initialized(&host);
    let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    let events = events_of(|| drop(vm));
    assert_eq!(events, [""; 0], "the vCPU holds it");
    let held = format!("pages={}", host.taken().len());
    let events = events_of(|| drop(vcpu));
    assert_eq!(events.len(), 1, "{events:?}");
    names(&events[0], &["ERROR", &held, "key=", "lost"]);

    let vm = runnable(&TestHost::new());
    let events = events_of(|| assert!(destroy(vm).is_clean()));
    assert_eq!(events, [""; 0]);
}
