//! Nothing that a caller can pass ends in a panic, and nothing is lost.

mod common;

use common::*;
use proptest::prelude::*;
use soft_amd_sp::{GuestPage, PageSize, Platform, RmpAdjust, RmpUpdate, Status};

/// One thing a host or guest may do, with operands drawn from few values so that they meet.
#[derive(Clone, Debug)]
enum Step {
    Command(u32, Vec<u8>),
    Fields(usize, Vec<u64>),
    Mailbox(u32, u64),
    Update(u64, RmpUpdate),
    Psmash(u64),
    Pvalidate(GuestPage, bool, bool),
    Adjust(GuestPage, RmpAdjust),
    HostWrite(u64, Vec<u8>),
    GuestWrite(GuestPage, Vec<u8>),
    Wbinvd,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (0_u64..24).prop_map(|page| page << 12),
        3 => (0_u64..4).prop_map(|page| page << 21),
        2 => 0_u64..0x80_0000,
        1 => any::<u64>(),
    ]
}

/// Small numbers, addresses, lengths and flags that mean something somewhere, and noise.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0_u64..16,
        6 => address(),
        1 => prop_oneof![Just(52), Just(48), Just(128), Just(0xd0), Just(0x824), Just(0x1000)],
        1 => Just(0x3_0000_u64),
        1 => any::<u64>(),
    ]
}

fn size(large: bool) -> PageSize {
    if large {
        PageSize::Size2M
    } else {
        PageSize::Size4K
    }
}

fn guest_page() -> impl Strategy<Value = GuestPage> {
    (0_u32..14, 0_u8..5, address(), address(), any::<bool>()).prop_map(
        |(asid, vmpl, gpa, spa, large)| GuestPage {
            asid,
            vmpl,
            gpa,
            spa,
            mapping: size(large),
        },
    )
}

fn update() -> impl Strategy<Value = RmpUpdate> {
    (
        address(),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        0_u32..14,
    )
        .prop_map(|(gpa, assigned, large, immutable, asid)| RmpUpdate {
            gpa,
            assigned,
            size: size(large),
            immutable,
            asid,
        })
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = |n| proptest::collection::vec(any::<u8>(), 0..n);
    prop_oneof![
        1 => (0_u32..0x120, bytes(0x50)).prop_map(|(id, b)| Step::Command(id, b)),
        12 => (0..Command::ALL.len(), proptest::collection::vec(value(), 10))
            .prop_map(|(i, v)| Step::Fields(i, v)),
        2 => (0_u32..0x120, address()).prop_map(|(id, at)| Step::Mailbox(id, at)),
        5 => (address(), update()).prop_map(|(at, u)| Step::Update(at, u)),
        1 => address().prop_map(Step::Psmash),
        2 => (guest_page(), any::<bool>(), any::<bool>()).prop_map(|(p, l, v)| Step::Pvalidate(p, l, v)),
        2 => (guest_page(), 0_u8..6, 0_u8..20, any::<bool>()).prop_map(|(p, t, m, vmsa)| {
            Step::Adjust(p, RmpAdjust { target_vmpl: t, permissions: m, vmsa })
        }),
        2 => (address(), bytes(64)).prop_map(|(at, b)| Step::HostWrite(at, b)),
        2 => (guest_page(), bytes(64)).prop_map(|(p, b)| Step::GuestWrite(p, b)),
        1 => Just(Step::Wbinvd),
    ]
}

fn take(p: &Platform, step: &Step) {
    match step {
        Step::Command(id, bytes) => {
            p.command(*id, &mut bytes.clone());
        }
        Step::Fields(index, values) => {
            let command = Command::ALL[*index];
            let mut buffer = vec![0; command.buffer_len()];
            for (field, value) in command.fields().iter().zip(values) {
                let len = field.len.min(8);
                buffer[field.offset..][..len].copy_from_slice(&value.to_le_bytes()[..len]);
            }
            p.command(command, &mut buffer);
        }
        Step::Mailbox(id, at) => {
            p.mailbox(*id, *at);
        }
        Step::Update(at, update) => {
            let _ = p.rmpupdate(*at, update);
        }
        Step::Psmash(at) => {
            let _ = p.psmash(*at);
        }
        Step::Pvalidate(page, large, on) => {
            let _ = p.pvalidate(page, size(*large), *on);
        }
        Step::Adjust(page, adjust) => {
            let _ = p.rmpadjust(page, PageSize::Size4K, adjust);
        }
        Step::HostWrite(at, bytes) => {
            let _ = p.host_write(*at, bytes);
        }
        Step::GuestWrite(page, bytes) => {
            let _ = p.guest_write(page, bytes);
        }
        Step::Wbinvd => p.wbinvd_all(),
    }
}

/// Checks the invariants, which hold at every moment.
fn check(p: &Platform) {
    use soft_amd_sp::{AsidState, GuestId, PageState};
    let s = p.snapshot();
    let _ = s.to_string();
    let mut bound = 0;
    for (asid, state) in &s.asids {
        let AsidState::Bound(guests) = state else {
            continue;
        };
        assert!(!guests.is_empty());
        for guest in guests {
            bound += 1;
            let holds = match guest {
                GuestId::Handle(h) => s
                    .guests
                    .iter()
                    .any(|g| g.handle == *h && g.asid == Some(*asid)),
                GuestId::Context(c) => s
                    .snp_guests
                    .iter()
                    .any(|g| g.context == *c && g.asid == Some(*asid)),
            };
            assert!(
                holds,
                "asid {asid} is bound to {guest}, which does not have it"
            );
        }
    }
    let active = s.guests.iter().filter(|g| g.asid.is_some()).count()
        + s.snp_guests.iter().filter(|g| g.asid.is_some()).count();
    assert_eq!(active, bound, "a guest has an asid that is not bound to it");
    // Every context is a page, and every such page a context.
    assert_eq!(
        s.pages_by_state()
            .get(&PageState::Context)
            .copied()
            .unwrap_or(0),
        s.snp_guests.len()
    );
    for range in &s.rmp {
        let e = range.entry;
        assert_eq!(e.state.is_guest(), e.asid != 0, "{range}");
        assert!(e.size.aligns(range.spa) && e.size.aligns(e.gpa), "{range}");
        assert!(p.host_write(range.spa, &[0]).is_err() || e.state == PageState::HvFixed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_operations_keeps_the_books(
        start in 0..3,
        steps in proptest::collection::vec(step(), 1..100),
    ) {
        let p = match start {
            0 => sev(1),
            1 => snp(1),
            _ => {
                let p = builder(1).build().unwrap();
                p.enable_snp_all();
                p
            }
        };
        if start != 2 {
            // Something to meet.
            p.rmpupdate(0x1000, &RmpUpdate::firmware()).ok();
            let gctx_paddr = page(0x1000);
            run(&p, SnpGctxCreate { gctx_paddr });
            snp_launch_start(&p, 0x1000, SnpPolicy::SMT);
            snp_activate(&p, 0x1000, 1);
            run(&p, LaunchStart::default());
        }
        for step in &steps {
            take(&p, step);
        }
        check(&p);
    }
}

#[test]
fn a_buffer_shorter_than_its_command_is_refused_with_its_length() {
    let p = sev(1);
    for command in Command::ALL {
        for len in 0..command.buffer_len() {
            let mut short = vec![0; len];
            assert_eq!(
                p.command(*command, &mut short),
                Status::INVALID_LEN,
                "{command} {len}"
            );
        }
    }
}

#[test]
fn reserved_bytes_must_be_zero_and_are_checked_after_the_state() {
    let p = sev(2);
    let handle = launch_start(&p, OPEN, 6);
    let reserved = |command: Command| -> Vec<usize> {
        (0..command.buffer_len())
            .filter(|i| {
                !command
                    .fields()
                    .iter()
                    .any(|f| (f.offset..f.offset + f.len).contains(i))
            })
            .collect()
    };
    let mut checked = 0;
    for command in [
        Command::LAUNCH_UPDATE_DATA,
        Command::LAUNCH_MEASURE,
        Command::LAUNCH_UPDATE_SECRET,
        Command::DBG_DECRYPT,
        Command::ATTESTATION,
        Command::SEND_START,
    ] {
        for at in reserved(command) {
            let mut bytes = vec![0; command.buffer_len()];
            bytes[..4].copy_from_slice(&handle.to_le_bytes());
            bytes[at] = 1;
            let allowed = matches!(
                command,
                Command::LAUNCH_UPDATE_DATA | Command::LAUNCH_MEASURE | Command::DBG_DECRYPT
            );
            let expected = if allowed {
                Status::INVALID_PARAM
            } else {
                Status::INVALID_GUEST_STATE
            };
            assert_eq!(
                p.command(command, &mut bytes),
                expected,
                "{command} byte {at:#x}"
            );
            checked += 1;
        }
    }
    assert!(checked > 20);
}

#[test]
fn unknown_commands_and_long_buffers() {
    let p = sev(3);
    for id in [0, 0x10, 0x7f, 0x83 + 0x100, u32::MAX] {
        assert_eq!(p.command(id, &mut []), Status::INVALID_COMMAND);
    }
    let mut long = [0; 0x100];
    p.command(Command::PLATFORM_STATUS, &mut long).ok().unwrap();
    assert_eq!(long[..3], [1, 55, 1]);
    for command in [
        Command::DOWNLOAD_FIRMWARE,
        Command::SNP_DOWNLOAD_FIRMWARE_EX,
    ] {
        assert_eq!(run_zeros(&p, command), Status::UNSUPPORTED);
    }
}

#[test]
fn machines_that_make_no_sense_are_not_built() {
    let build = |b: soft_amd_sp::Builder| b.build().map(|_| ()).unwrap_err().to_string();
    let b = Platform::builder;
    assert!(build(b().memory(0)).contains("2 MiB"));
    assert!(build(b().memory(0x1000)).contains("2 MiB"));
    assert!(build(b().memory(2 << 40)).contains("2 MiB"));
    assert!(build(b().cores(0)).contains("cores"));
    assert!(build(b().asids(0, 5)).contains("asid"));
    assert!(build(b().asids(7, 5)).contains("asid"));
    assert!(build(b().asids(6, 1 << 16)).contains("asid"));
    assert!(build(b().c_bit(20)).contains("c-bit"));
    assert!(build(b().c_bit(64)).contains("c-bit"));
    assert!(build(b().report_version(4)).contains("report version"));
    // No ASID for guests without SEV-ES, or none with it.
    b().asids(6, 5).build().unwrap();
    b().asids(1, 5).build().unwrap();
}
