//! MSR accesses that user space sees. Where a test re-tells a case of the kernel's userspace_msr_exit_test, it names it.

use kvm_ops_uapi::run::{MsrExit, exit_reason};
use kvm_ops_uapi::vm::msr_filter_flags::{DEFAULT_DENY, READ, WRITE};
use kvm_ops_uapi::vm::{MsrFilter, msr_exit_reason};
use kvm_ops_uapi::{U32, U64, cap, ioctl};

use crate::guest::{Answer, CODE, Guest};

const XSS: u32 = 0xda0;
const FLUSH_CMD: u32 = 0x10b;
const POWER_CTL: u32 = 0x1fc;
const PAT: u32 = 0x277;
const SYSCALL_MASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const NOBODYS: u32 = 0x474f_4f00;
/// Counts faults, and goes past the instruction of two bytes.
const FAULTS: [u8; 13] = [
    0x55, // push bp
    0x89, 0xe5, // mov bp, sp
    0x83, 0x46, 0x02, 0x02, // add word [bp + 2], 2
    0x5d, // pop bp
    0xfe, 0x06, 0x00, 0x50, // inc byte [0x5000]
    0xcf, // iret
];

/// `mov ecx, MSR; rdmsr; out 0x80, eax`.
fn read(msr: u32) -> Vec<u8> {
    let load = [&[0x66, 0xb9], &msr.to_le_bytes()[..]].concat();
    [&load[..], &[0x0f, 0x32, 0x66, 0xe7, 0x80]].concat()
}

/// `mov ecx, MSR; mov eax, VALUE; xor edx, edx; wrmsr; out 0x81, al`.
fn write(msr: u32, value: u32) -> Vec<u8> {
    [
        &[0x66, 0xb9],
        &msr.to_le_bytes()[..],
        &[0x66, 0xb8],
        &value.to_le_bytes(),
        &[0x66, 0x31, 0xd2, 0x0f, 0x30, 0xe6, 0x81],
    ]
    .concat()
}

fn guest(code: &[Vec<u8>]) -> Guest {
    let guest = Guest::new(&code.concat());
    assert!(
        code.concat().len() < 0x1000,
        "it ends in front of the handler"
    );
    guest.write(0x2000, &FAULTS);
    guest.write(13 * 4, &0x2000u32.to_le_bytes());
    guest
}

fn faults(guest: &Guest) -> u8 {
    guest.read::<1>(0x5000)[0]
}

/// Flags, first MSR, number, bitmap.
type Range<'a> = (u32, u32, u32, &'a [u8]);

fn set_filter(guest: &Guest, flags: u32, ranges: &[Range<'_>]) -> Answer {
    let mut filter = MsrFilter {
        flags: U32::new(flags),
        ..MsrFilter::default()
    };
    for (to, (flags, base, count, bitmap)) in filter.ranges.iter_mut().zip(ranges) {
        (to.flags, to.base) = (U32::new(*flags), U32::new(*base));
        to.nmsrs = U32::new(*count);
        to.bitmap = U64::new(guest.host.task.put(*bitmap));
    }
    guest.call(guest.vm, ioctl::KVM_X86_SET_MSR_FILTER, &filter)
}

fn refuse(guest: &Guest, flags: u32, msrs: &[u32]) {
    let ranges: Vec<Range<'_>> = msrs
        .iter()
        .map(|msr| (flags, *msr, 1, &[0; 8][..]))
        .collect();
    set_filter(guest, 0, &ranges).unwrap();
}

/// Runs to an access that leaves, and answers it with a value, or #GP.
fn answers(guest: &Guest, expected: (u32, u32, u64, u64), answer: Result<u64, ()>) {
    let (reason, msr, value, why) = expected;
    assert_eq!(guest.run(), reason, "{msr:#x}");
    let exit: MsrExit = guest.exit();
    let told = (exit.index.get(), exit.data.get(), exit.reason.get().into());
    assert_eq!(told, (msr, value, why));
    assert_eq!(exit.error, 0);
    guest.answer(&match answer {
        Ok(data) => MsrExit {
            data: U64::new(data),
            ..exit
        },
        Err(()) => MsrExit { error: 1, ..exit },
    });
}

/// Runs to what was read.
fn said(guest: &Guest) -> u32 {
    let (access, data) = guest.run_to_port();
    assert_eq!((access.1, access.2), (0x80, 4));
    u32::from_le_bytes(data.try_into().unwrap())
}

/// Runs to the end of a write.
fn written(guest: &Guest) {
    assert_eq!(guest.run_to_port().0.1, 0x81);
}

const RDMSR: u32 = exit_reason::X86_RDMSR;
const WRMSR: u32 = exit_reason::X86_WRMSR;
const FILTER: u64 = msr_exit_reason::FILTER;
const UNKNOWN: u64 = msr_exit_reason::UNKNOWN;
const INVAL: u64 = msr_exit_reason::INVAL;

/// msr_filter_allow: MSRs that the kernel knows, does not know, and that nobody knows.
#[test]
fn a_filter_hands_msrs_to_user_space_which_may_refuse_them() {
    let guest = guest(&[
        read(XSS),
        write(XSS, 0),
        write(XSS, 1),
        read(FLUSH_CMD),
        write(FLUSH_CMD, 1),
        write(NOBODYS, 2),
        read(NOBODYS),
    ]);
    guest.enable(cap::X86_USER_SPACE_MSR, FILTER);
    refuse(&guest, READ | WRITE, &[XSS, FLUSH_CMD, NOBODYS]);
    answers(&guest, (RDMSR, XSS, 0, FILTER), Ok(0));
    assert_eq!(said(&guest), 0);
    answers(&guest, (WRMSR, XSS, 0, FILTER), Ok(0));
    written(&guest);
    answers(&guest, (WRMSR, XSS, 1, FILTER), Err(()));
    written(&guest);
    assert_eq!(faults(&guest), 1);
    answers(&guest, (RDMSR, FLUSH_CMD, 0, FILTER), Err(()));
    guest.run_to_port();
    assert_eq!(faults(&guest), 2);
    answers(&guest, (WRMSR, FLUSH_CMD, 1, FILTER), Ok(0));
    written(&guest);
    answers(&guest, (WRMSR, NOBODYS, 2, FILTER), Ok(0));
    written(&guest);
    answers(&guest, (RDMSR, NOBODYS, 0, FILTER), Ok(2));
    assert_eq!(said(&guest), 2);
    assert_eq!(faults(&guest), 2);
}

/// msr_filter_deny: what no range names is refused, and each reason leaves as itself.
#[test]
fn each_reason_for_which_an_access_fails_leaves_as_itself() {
    let accesses = [
        write(SYSCALL_MASK, 7),
        read(SYSCALL_MASK),
        read(GS_BASE),
        write(POWER_CTL, 0x1234),
        read(POWER_CTL),
        read(NOBODYS),
        write(NOBODYS, 0x1234),
        write(PAT, 2),
    ];
    let guest = guest(&[accesses.concat(), accesses.concat()]);
    guest.enable(cap::X86_USER_SPACE_MSR, FILTER | UNKNOWN | INVAL);
    let all = [0xff; 8];
    set_filter(
        &guest,
        DEFAULT_DENY,
        &[
            (WRITE, SYSCALL_MASK, 64, &all),
            (READ, POWER_CTL, 1, &all),
            (READ | WRITE, NOBODYS, 64, &all),
            (READ | WRITE, PAT, 1, &all),
        ],
    )
    .unwrap();
    written(&guest);
    for msr in [SYSCALL_MASK, GS_BASE] {
        answers(&guest, (RDMSR, msr, 0, FILTER), Ok(msr.into()));
        assert_eq!(said(&guest), msr);
    }
    answers(&guest, (WRMSR, POWER_CTL, 0x1234, FILTER), Ok(0));
    written(&guest);
    assert_eq!(said(&guest), 0, "user space kept it");
    let failing = |guest: &Guest| {
        answers(guest, (RDMSR, NOBODYS, 0, UNKNOWN), Ok(NOBODYS.into()));
        assert_eq!(said(guest), NOBODYS);
        answers(guest, (WRMSR, NOBODYS, 0x1234, UNKNOWN), Ok(0));
        written(guest);
        answers(guest, (WRMSR, PAT, 2, INVAL), Err(()));
        written(guest);
    };
    failing(&guest);
    // A filter that lets all through.
    set_filter(&guest, 0, &[]).unwrap();
    written(&guest);
    assert_eq!((said(&guest), said(&guest)), (7, 0));
    written(&guest);
    assert_eq!(said(&guest), 0x1234);
    failing(&guest);
    assert_eq!(faults(&guest), 2);
}

/// msr_permission_bitmap: a new filter takes the place of the old one at once.
#[test]
fn a_filter_takes_the_place_of_the_last_one() {
    let both = [read(FS_BASE), read(GS_BASE)].concat();
    let guest = guest(&[both.clone(), both.clone(), both]);
    guest.enable(cap::X86_USER_SPACE_MSR, FILTER);
    for (refused, other) in [(FS_BASE, GS_BASE), (GS_BASE, FS_BASE)] {
        refuse(&guest, READ, &[refused]);
        for msr in [FS_BASE, GS_BASE] {
            if msr == refused {
                answers(&guest, (RDMSR, msr, 0, FILTER), Ok(msr.into()));
                assert_eq!(said(&guest), msr);
            } else {
                assert_eq!(said(&guest), 0, "{other:#x} is the guest's");
            }
        }
    }
    refuse(&guest, READ, &[XSS]);
    assert_eq!((said(&guest), said(&guest)), (0, 0));
}

#[test]
fn what_was_not_asked_for_faults_and_x2apic_registers_are_never_filtered() {
    let guest = guest(&[
        read(SYSCALL_MASK),
        read(NOBODYS),
        write(PAT, 2),
        read(0x802),
    ]);
    set_filter(&guest, DEFAULT_DENY, &[(READ, NOBODYS, 1, &[1; 8])]).unwrap();
    guest.enable(cap::X86_USER_SPACE_MSR, INVAL);
    guest.run_to_port();
    guest.run_to_port();
    written(&guest);
    assert_eq!(faults(&guest), 3);
    // There is no local APIC: the filter lets it through, and the processor refuses.
    answers(&guest, (RDMSR, 0x802, 0, INVAL), Ok(0x77));
    assert_eq!(said(&guest), 0x77);
}

#[test]
fn registers_set_meanwhile_give_the_answer_up() {
    let guest = guest(&[read(NOBODYS), read(SYSCALL_MASK)]);
    guest.enable(cap::X86_USER_SPACE_MSR, UNKNOWN);
    answers(&guest, (RDMSR, NOBODYS, 0, UNKNOWN), Ok(1));
    let mut regs = guest.regs();
    assert_eq!(regs.rip.get(), CODE + 6, "at the instruction");
    regs.rip = U64::new(CODE + read(NOBODYS).len() as u64);
    guest.set_regs(&regs);
    assert_eq!(said(&guest), 0);
}

/// user_exit_msr_flags: bits of the flags that have no meaning.
#[test]
fn only_known_flags_are_taken() {
    let guest = guest(&[]);
    for bit in 0..32 {
        let flag = 1 << bit;
        let taken = set_filter(&guest, flag, &[(READ, 0, 1, &[0; 8])]);
        assert_eq!(taken.is_ok(), flag & DEFAULT_DENY != 0, "{flag:#x}");
        let taken = set_filter(&guest, 0, &[(flag, 0, 1, &[0; 8])]);
        assert_eq!(taken.is_ok(), flag & (READ | WRITE) != 0, "{flag:#x}");
    }
}
