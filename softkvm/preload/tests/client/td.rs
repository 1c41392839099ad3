//! TDs: their launch, its refusals, and their memory.

use kvm_ops::{
    AnyVm, Call, EncParams, Error, Field, Gfn, Gpa, Gpaw, InitialPage, InitialPageKind, Kind,
    Privacy, Result, SharedMask, Step, TdParams, Tech, VcpuId, VcpuOps, Vm, VmConfig, VmOps,
    create,
};

use crate::common::again;
use crate::guest::{BYTES, FIRST, START, add_pages, contents, host, memory, slot};

type Td = Vm<AnyVm<kvm_ops::kvm::KvmHost>>;

/// Runs the test again under the library on an Intel machine. True in that run.
fn inside(test: &str) -> bool {
    again(test, "intel").is_none()
}

fn with(params: TdParams) -> VmConfig {
    VmConfig::new(Kind::Of(Tech::Tdx))
        .vcpus(2)
        .enc(EncParams::Td(Box::new(params)))
}

fn page(td: &mut Td, gpa: u64, kind: InitialPageKind) -> Result<()> {
    td.add_initial_page(&InitialPage {
        gpa: Gpa::new(gpa),
        contents: &contents(0),
        kind,
    })
}

#[test]
fn a_td_is_built_and_its_registers_and_measurement_are_its_own() {
    if !inside("td::a_td_is_built_and_its_registers_and_measurement_are_its_own") {
        return;
    }
    let memory = memory();
    for (gpaw, bit) in [(Gpaw::Bits48, 47), (Gpaw::Bits52, 51)] {
        let params = TdParams {
            gpaw,
            ..TdParams::default()
        };
        let mut td = create(&host(), &with(params)).unwrap();
        assert_eq!(td.shared_mask(), SharedMask::shared_bit(bit).unwrap());
        td.set_memory_slot(slot(&memory)).unwrap();
        let vcpus = [0, 1].map(|id| td.create_vcpu(VcpuId(id)).unwrap());
        assert!(matches!(vcpus[0].regs(), Err(Error::Protected(_))));
        add_pages(&mut td);
        page(&mut td, START, InitialPageKind::Unmeasured).unwrap();
        assert_eq!(td.step(), Step::Initialized);
        td.finalize().unwrap();
        assert_eq!(td.step(), Step::Runnable);
        assert!(matches!(td.measurement(), Err(Error::NotOffered(_))));
        let late = page(&mut td, START + 4096, InitialPageKind::Measured);
        assert_eq!(late, Err(Error::WrongState(Step::Runnable)));
        drop(vcpus);
        assert!(td.destroy().is_clean());
    }
}

#[test]
fn parameters_that_the_host_does_not_support_are_named() {
    if !inside("td::parameters_that_the_host_does_not_support_are_named") {
        return;
    }
    for (params, expected) in [
        (
            TdParams {
                attributes: 1 << 28 | 1,
                ..TdParams::default()
            },
            Error::Invalid(Field::TdAttributes, 1),
        ),
        (
            TdParams {
                xfam: 0b11 | 1 << 62,
                ..TdParams::default()
            },
            Error::Invalid(Field::Xfam, 1 << 62),
        ),
        (
            TdParams {
                cpuid: vec![kvm_ops::CpuidEntry {
                    leaf: 0x7fff_ffff,
                    subleaf: 0,
                    subleaf_significant: false,
                    regs: [0; 4],
                }],
                ..TdParams::default()
            },
            Error::Sys(Call::TdxInitVm, libc::EINVAL),
        ),
    ] {
        let refused = create(&host(), &with(params)).unwrap_err();
        assert_eq!(refused.error, expected);
        assert!(refused.report.unwrap().is_clean());
    }
}

#[test]
fn a_machine_without_free_keys_says_so() {
    if !inside("td::a_machine_without_free_keys_says_so") {
        return;
    }
    let (host, config) = (host(), VmConfig::new(Kind::Of(Tech::Tdx)));
    let mut tds = Vec::new();
    let refused = loop {
        match create(&host, &config) {
            Ok(td) => tds.push(td),
            Err(refused) => break refused,
        }
        assert!(tds.len() < 2000);
    };
    assert_eq!(refused.error, Error::NoKeyId);
    let why = refused.diagnosis.unwrap().to_string();
    assert!(
        why.contains("the kernel demands that a KeyID is free"),
        "{why}"
    );
    drop(tds.pop());
    assert!(create(&host, &config).is_ok());
}

#[test]
fn pages_and_the_end_of_a_launch_are_refused_with_their_reason() {
    if !inside("td::pages_and_the_end_of_a_launch_are_refused_with_their_reason") {
        return;
    }
    let memory = memory();
    let mut td = create(&host(), &with(TdParams::default())).unwrap();
    td.set_memory_slot(slot(&memory)).unwrap();
    let no_vcpu = Err(Error::Invalid(Field::VcpuCount, 0));
    assert_eq!(page(&mut td, FIRST, InitialPageKind::Measured), no_vcpu);
    assert_eq!(td.finalize(), no_vcpu);
    let vcpu = td.create_vcpu(VcpuId(0)).unwrap();
    assert_eq!(
        td.create_vcpu(VcpuId(0)).err(),
        Some(Error::Exists(Field::Vcpu, 0))
    );
    page(&mut td, FIRST, InitialPageKind::Measured).unwrap();
    let twice = page(&mut td, FIRST, InitialPageKind::Measured).unwrap_err();
    assert_eq!(twice, Error::Sys(Call::TdxInitMemRegion, libc::EIO));
    let why = td.explain(twice).to_string();
    assert!(
        why.contains("the kernel demands that the page was not added before"),
        "{why}"
    );
    for kind in [
        InitialPageKind::Zero,
        InitialPageKind::Secrets,
        InitialPageKind::Cpuid,
    ] {
        let refused = page(&mut td, START, kind);
        assert!(matches!(refused, Err(Error::NotOffered(_))), "{refused:?}");
    }
    // A page that was made shared cannot be a private one.
    let first = Gfn::new(START / 4096);
    td.set_memory_attributes(first, 1, Privacy::Shared).unwrap();
    assert_eq!(
        page(&mut td, START, InitialPageKind::Measured),
        Err(Error::Sys(Call::TdxInitMemRegion, libc::EINVAL))
    );
    drop(vcpu);
    assert!(td.destroy().is_clean());
}

#[test]
fn a_tds_frames_change_and_are_mapped_before_they_are_touched() {
    if !inside("td::a_tds_frames_change_and_are_mapped_before_they_are_touched") {
        return;
    }
    let memory = memory();
    let mut td = create(&host(), &with(TdParams::default())).unwrap();
    td.set_memory_slot(slot(&memory)).unwrap();
    let vcpu = td.create_vcpu(VcpuId(0)).unwrap();
    add_pages(&mut td);
    td.finalize().unwrap();
    let first = Gfn::new(START / 4096);
    assert_eq!(td.pre_fault_memory(first, 8), Ok(8));
    // SAFETY: the page is mapped, and the guest does not run.
    let shared = || unsafe { memory.as_ptr().read_volatile() };
    // SAFETY: as above.
    unsafe { memory.as_ptr().write_volatile(9) };
    let pages = BYTES / 4096;
    let whole = td.set_memory_attributes(first, pages + 5, Privacy::Shared);
    assert_eq!(whole, Ok(pages), "the frames of the slot");
    assert_eq!(td.back_end().privacy(first), Privacy::Shared);
    assert_eq!(shared(), 9);
    assert_eq!(td.set_memory_attributes(first, 1, Privacy::Private), Ok(1));
    assert_eq!(shared(), 0, "given back to the system");
    assert_eq!(td.pre_fault_memory(first, 8), Ok(1));
    drop(vcpu);
    assert!(td.destroy().is_clean());
}
