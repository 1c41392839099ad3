//! An image launched page by page through the commands has the digest computed from the file.

mod common;

use common::*;
use kvm_ops_ovmf::{Section, compose};
use soft_amd_sp::Platform;
use soft_amd_sp::measure::{
    BSP_EIP, InitialVmsa, Launch, LaunchMeasure, Ovmf, PageType, SectionKind, VMSA_GPA, Vmm,
};

const VCPUS: u32 = 3;
const SIGNATURE: u32 = 0x80_0f12;
const IMAGE: u64 = 0x100_0000;
const PAGES: u64 = 0x200_0000;
const GCTX: u64 = 0x1000;
const ASID: u32 = 1;

/// An image with SEV metadata with every kind of section, and a reset block.
fn synthetic() -> Vec<u8> {
    let mut image: Vec<u8> = (0..0x4000_u32).map(|i| ((i * 31) >> 4) as u8).collect();
    let section = |(gpa, size, kind)| Section { gpa, size, kind };
    let sections = [
        (0x80_0000, 0x3000, SectionKind::SecMem),
        (0x80_a000, 0x1000, SectionKind::SecMem),
        (0x80_d000, 0x1000, SectionKind::Secrets),
        (0x80_e000, 0x1000, SectionKind::Cpuid),
        (0x81_0000, 0x2000, SectionKind::SvsmCaa),
        (0x81_2000, 0x1000, SectionKind::KernelHashes),
    ]
    .map(section);
    compose(&mut image, &sections, Some(0x80_b004), None).unwrap();
    image
}

/// The images to launch: one made here, and a real one if it is installed.
fn images() -> Vec<Vec<u8>> {
    const REAL: &str = "/usr/share/ovmf/OVMF.fd";
    let mut out = vec![synthetic()];
    match std::fs::read(REAL) {
        Ok(image) => out.push(image),
        Err(error) => println!("skipped {REAL}: {error}"),
    }
    out
}

fn machine() -> soft_amd_sp::Builder {
    builder(1).memory(64 << 20)
}

fn vmsa(index: u32, ovmf: &Ovmf, sev_features: u64) -> Box<[u8; 4096]> {
    let eip = if index == 0 {
        BSP_EIP
    } else {
        ovmf.reset_eip().unwrap()
    };
    let vmm = Vmm::Qemu;
    InitialVmsa {
        eip,
        vcpu_sig: SIGNATURE,
        sev_features,
        vmm,
    }
    .page()
}

fn off_line(image: &[u8]) -> Launch<'_> {
    Launch::new(image)
        .vcpus(VCPUS)
        .vcpu_sig(SIGNATURE)
        .guest_features(1)
}

#[test]
fn snp_launch_of_an_image_has_its_off_line_digest() {
    for image in images() {
        let p = snp_from(machine());
        snp_launch(&p, GCTX, SnpPolicy::SMT, ASID);
        let add = |spa: u64, gpa: u64, page_type: PageType| {
            snp_add(&p, GCTX, ASID, spa, gpa, page_type).ok().unwrap();
        };
        p.host_write(IMAGE, &image).unwrap();
        let base = (1 << 32) - image.len() as u64;
        for at in (0..image.len() as u64).step_by(0x1000) {
            add(IMAGE + at, base + at, PageType::Normal);
        }
        let ovmf = Ovmf::parse(&image).unwrap();
        let mut spa = PAGES;
        for section in ovmf.sections() {
            let page_type = match section.kind {
                SectionKind::Secrets => PageType::Secrets,
                SectionKind::Cpuid => PageType::Cpuid,
                _ => PageType::Zero,
            };
            for at in (0..u64::from(section.size)).step_by(0x1000) {
                add(spa, u64::from(section.gpa) + at, page_type);
                spa += 0x1000;
            }
        }
        for index in 0..VCPUS {
            p.host_write(spa, &vmsa(index, &ovmf, 1)[..]).unwrap();
            add(spa, VMSA_GPA, PageType::Vmsa);
            spa += 0x1000;
        }
        snp_finish(&p, GCTX).ok().unwrap();
        let launched = p.snapshot().snp_guests[0].launch_digest;
        assert_eq!(launched, off_line(&image).snp().unwrap());
    }
}

/// Launches an SEV or SEV-ES guest and checks MEASURE against the digest.
fn check_measure(p: &Platform, image: &[u8], policy: SevPolicy, asid: u32, digest: &[u8; 32]) {
    let guest_owner = owner(p, policy);
    let (status, out) = run_out(p, owner_start(p, &guest_owner, policy));
    status.ok().unwrap();
    let handle = out.handle.get();
    activate(p, handle, asid).ok().unwrap();
    p.host_write(IMAGE, image).unwrap();
    // The pieces in which the image is passed do not matter.
    let half = image.len() as u32 / 2 / 16 * 16;
    update_data(p, handle, IMAGE, half).ok().unwrap();
    let rest = image.len() as u32 - half;
    update_data(p, handle, IMAGE + u64::from(half), rest)
        .ok()
        .unwrap();
    if policy.contains(SevPolicy::ES) {
        let ovmf = Ovmf::parse(image).unwrap();
        for index in 0..VCPUS {
            p.host_write(PAGES, &vmsa(index, &ovmf, 0)[..]).unwrap();
            update_vmsa(p, handle, PAGES, 0x1000).ok().unwrap();
        }
    }
    launch_measure(p, handle, SCRATCH).ok().unwrap();
    let mut bytes = [0; 48];
    p.host_read(SCRATCH, &mut bytes).unwrap();
    let got = LaunchMeasure::from_bytes(&bytes);
    let version = soft_amd_sp::measure::ApiVersion {
        major: 1,
        minor: 55,
        build: 40,
    };
    assert!(guest_owner.expects(version, digest, &got));
}

#[test]
fn sev_and_es_launches_of_an_image_have_their_off_line_digests() {
    for image in images() {
        let p = sev_from(machine());
        let launch = off_line(&image);
        check_measure(&p, &image, OPEN, 6, &launch.sev().unwrap());
        check_measure(&p, &image, SevPolicy::ES, 1, &launch.sev_es().unwrap());
    }
}
