//! The context of devices: memory rules, dirty pages, and interrupts from a thread of their own.

mod support;

use kvm_ops::guest::Script;
use kvm_ops::sim::SimHost;
use kvm_ops::{
    Error, Exit, Field, Gfn, Gpa, Host, IoEvent, IoEventMatch, Irqchip, Kind, Msi, Privacy, Tech,
    VcpuId, Vendor,
};
use kvm_ops_machine::{
    ConsoleSink, End, ExitContext, Flow, Image, Inside, Machine, MachineConfig, MachineError,
};
use support::{kvm, limits};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

const KINDS: [(Vendor, Kind); 6] = [
    (Vendor::Intel, Kind::Normal),
    (Vendor::Amd, Kind::Normal),
    (Vendor::Intel, Kind::Of(Tech::Tdx)),
    (Vendor::Amd, Kind::Of(Tech::Sev)),
    (Vendor::Amd, Kind::Of(Tech::SevEs)),
    (Vendor::Amd, Kind::Of(Tech::SevSnp)),
];

/// Runs a guest that writes page 1 and rings; a device's thread then writes other pages in each way that
/// there is.
fn dirty<H: Host>(machine: &mut Machine<H>) {
    let at = IoEvent::Port(0x80);
    let bell = machine.parts().io_event(at, IoEventMatch::Any).unwrap();
    let devices = machine.devices(ConsoleSink::discard());
    let work = |inside: &dyn Inside| -> Result<Vec<Gfn>, MachineError> {
        bell.wait()?;
        let memory = inside.memory();
        memory.write(Gpa::new(0x2_0fff), &[1; 2])?;
        let text = b"virtio";
        let by_rust_vmm = memory.write_slice(text, GuestAddress(0x3_0000));
        by_rust_vmm.expect("memory");
        memory.mark_dirty(Gpa::new(0x4_0000), 1)?;
        let mut same = [0; 6];
        memory.read(Gpa::new(0x3_0000), &mut same)?;
        assert_eq!(&same, text);
        inside.dirty_frames()
    };
    let (report, frames) = machine
        .run_while(&devices, limits(), |parts| work(parts))
        .unwrap();
    assert!(!report.is_failure(), "{report:?}");
    let expected = [1, 0x20, 0x21, 0x30, 0x40].map(Gfn::new);
    assert_eq!(frames.unwrap(), expected);
    assert_eq!(machine.dirty_frames().unwrap(), [], "taken");
}

#[test]
fn pages_that_a_device_wrote_are_in_the_dirty_log_beside_the_guest_s() {
    let config = || MachineConfig::new().memory(1 << 20).log_dirty(true);
    let script = Script::new()
        .write(Gpa::new(0x1000), b"x")
        .output(0x80, &[1]);
    let host = SimHost::new(Vendor::Amd);
    dirty(&mut Machine::build(&host, config().program(script)).unwrap());
    if let Some(host) = kvm() {
        // mov byte [0x1000], 1; out 0x80, al; hlt
        let code = [0xc6, 0x06, 0x00, 0x10, 0x01, 0xe6, 0x80, 0xf4];
        let config = config().image(Image::flat("writer", code));
        dirty(&mut Machine::build(&host, config).unwrap());
    }
}

#[test]
fn a_device_reaches_shared_pages_of_a_td_or_an_snp_guest_and_no_others() {
    for (vendor, kind) in KINDS {
        let config = MachineConfig::new().kind(kind).memory(1 << 20);
        let machine = Machine::build(&SimHost::new(vendor), config).unwrap();
        let parts = machine.parts();
        let (page, across) = (Gpa::new(0x8000), Gpa::new(0x8ffe));
        if machine.tech().is_confidential() {
            let error = parts.dirty_frames().unwrap_err();
            assert!(matches!(error, MachineError::Step { .. }), "{error}");
        }
        let refuses = matches!(machine.tech(), Tech::Tdx | Tech::SevSnp);
        if refuses {
            let error = parts.memory().read(page, &mut [0; 4]).unwrap_err();
            assert_eq!(error.to_string(), "page at 0x8000 is private to the guest");
            assert!(error.hint().is_some_and(|hint| hint.contains("share")));
            parts.convert(page, 1, Privacy::Shared).unwrap();
            let error = parts.memory().write(across, &[0; 4]).unwrap_err();
            assert!(
                matches!(error, MachineError::Private { gpa } if gpa.get() == 0x9000),
                "{error}"
            );
            let error = parts
                .memory()
                .read_slice(&mut [0; 4], GuestAddress(across.get()));
            assert!(
                matches!(error, Err(GuestMemoryError::IOError(_))),
                "{error:?}"
            );
            parts.convert(Gpa::new(0x9000), 1, Privacy::Shared).unwrap();
        }
        parts.memory().write(across, b"both").unwrap();
        let mut data = [0; 4];
        parts.memory().read(across, &mut data).unwrap();
        assert_eq!(&data, b"both", "{kind:?}");
        let outside = parts.memory().read(Gpa::new((1 << 20) - 1), &mut [0; 2]);
        assert!(matches!(outside, Err(MachineError::Access { .. })));
        if machine.tech().is_confidential() {
            parts.convert(page, 1, Privacy::Private).unwrap();
            let refused = parts.memory().read(page, &mut data).is_err();
            assert_eq!(refused, refuses, "{kind:?}");
        }
    }
}

#[test]
fn a_device_s_thread_interrupts_a_halted_guest_in_each_way_in_every_kind_of_vm() {
    for (vendor, kind) in KINDS {
        let config = MachineConfig::new()
            .kind(kind)
            .memory(1 << 20)
            .irqchip(Irqchip::Split)
            .program(Script::new().halt().halt().halt().halt());
        let mut machine = Machine::build(&SimHost::new(vendor), config).unwrap();
        let devices = machine.devices(ConsoleSink::discard());
        let work = |inside: &dyn Inside| -> kvm_ops::Result<()> {
            let vcpu = VcpuId(0);
            inside.deliver_interrupt(vcpu, 0x30)?;
            assert!(inside.signal_msi(Msi::to(vcpu, 0x31))?);
            for (gsi, vector) in [(1, 0x32), (2, 0x33)] {
                inside.set_gsi_route(gsi, Msi::to(vcpu, vector))?;
            }
            inside.set_irq_line(1, true)?;
            let event = inside.irq_event(2)?;
            assert_eq!(event.raw_fd(), None);
            event.signal()
        };
        let (report, done) = machine
            .run_while(&devices, limits(), |parts| work(parts))
            .unwrap();
        assert_eq!((report.end, done), (End::Shutdown, Ok(())), "{kind:?}");
    }
}

#[test]
fn interrupts_that_lead_nowhere_are_refused_by_name() {
    let machine = |irqchip| {
        let config = MachineConfig::new().memory(1 << 20).irqchip(irqchip);
        Machine::build(&SimHost::new(Vendor::Intel), config).unwrap()
    };
    let without = machine(Irqchip::None);
    let msi = Msi::to(VcpuId(0), 0x30);
    let none = without.parts();
    for refused in [
        none.set_irq_line(1, true),
        none.set_gsi_route(1, msi),
        none.signal_msi(msi).map(drop),
        none.irq_event(1).map(drop),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::NotOffered(_)), "{error}");
        let hint = MachineError::from(error).hint();
        assert!(
            hint.is_some_and(|hint| hint.contains("irqchip")),
            "{hint:?}"
        );
    }
    let split = machine(Irqchip::Split);
    let split = split.parts();
    let no_line = Error::NotFound(Field::Gsi, 1);
    assert_eq!(split.set_irq_line(1, true), Err(no_line));
    assert_eq!(split.irq_event(1).err(), Some(no_line));
    let nmi = Msi { data: 0x400, ..msi };
    assert_eq!(
        split.signal_msi(nmi),
        Err(Error::Invalid(Field::Msi, msi.address))
    );
    let absent = split.signal_msi(Msi::to(VcpuId(9), 0x30));
    assert_eq!(absent, Err(Error::Invalid(Field::Vcpu, 9)));
}

/// A machine of a test: memory, and nothing else.
struct Bare<'a>(&'a kvm_ops_machine::GuestRam);

impl Inside for Bare<'_> {
    fn memory(&self) -> kvm_ops_machine::DeviceMemory<'_> {
        kvm_ops_machine::DeviceMemory::new(self.0)
    }
}

#[test]
fn a_device_is_tested_without_a_vm() {
    let config = MachineConfig::new().memory(1 << 20);
    let machine = Machine::build(&SimHost::new(Vendor::Intel), config).unwrap();
    machine.memory().write(Gpa::new(0x1000), b"in").unwrap();
    let device = |exit: &mut ExitContext<'_>| {
        let memory = exit.machine().memory();
        let mut data = [0; 2];
        memory.read(Gpa::new(0x1000), &mut data).unwrap();
        exit.data().copy_from_slice(&data);
        Flow::Continue
    };
    let (inside, mut data) = (Bare(machine.memory()), [0; 2]);
    let exit = Exit::MmioRead {
        gpa: Gpa::new(0xd000_0000),
        len: 2,
    };
    let mut context = ExitContext::new(VcpuId(0), exit, &mut data, &inside);
    assert_eq!(device(&mut context), Flow::Continue);
    assert_eq!(&data, b"in");
    let refused = inside.set_irq_line(0, true).unwrap_err();
    assert!(matches!(refused, Error::NotOffered(_)), "{refused}");
    assert!(!inside.is_ending() && inside.dirty_frames().is_err());
}
