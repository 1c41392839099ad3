//! The host's side of a call is the reverse of the guest's.

use kvm_ops_guest::GpaRange;
use kvm_ops_guest::tdx::{Gpaw, QuoteHeader, QuoteStatus, Regs, Vmcall, VmcallStatus, Width};
use proptest::prelude::*;

const SHARED: u64 = 1 << 47;

fn widths() -> impl Strategy<Value = Width> {
    prop::sample::select(vec![Width::One, Width::Two, Width::Four, Width::Eight])
}

fn calls() -> impl Strategy<Value = Vmcall> {
    let io = || (any::<u16>(), widths());
    let mmio = || ((0u64..1 << 47), widths());
    prop_oneof![
        any::<(u32, u32)>().prop_map(|(leaf, subleaf)| Vmcall::Cpuid { leaf, subleaf }),
        any::<bool>().prop_map(|interrupts_blocked| Vmcall::Halt { interrupts_blocked }),
        io().prop_map(|(port, width)| Vmcall::In { port, width }),
        (io(), any::<u64>()).prop_map(|((port, width), value)| Vmcall::Out {
            port,
            width,
            value: width.cut(value)
        }),
        any::<u32>().prop_map(Vmcall::RdMsr),
        any::<(u32, u64)>().prop_map(|(msr, value)| Vmcall::WrMsr(msr, value)),
        mmio().prop_map(|(gpa, width)| Vmcall::MmioRead { gpa, width }),
        (mmio(), any::<u64>()).prop_map(|((gpa, width), value)| Vmcall::MmioWrite {
            gpa,
            width,
            value: width.cut(value)
        }),
        any::<u64>().prop_map(|leaf| Vmcall::VmcallInfo { leaf }),
        (0u64..1 << 30, 1u64..64).prop_map(|(page, pages)| {
            Vmcall::GetQuote(GpaRange::pages(page << 12, pages).expect("a range"))
        }),
        (32u8..).prop_map(|vector| Vmcall::EventNotify { vector }),
        (any::<u64>(), any::<[[u8; 32]; 2]>()).prop_map(|(code, halves)| {
            let mut text = [0; 64];
            text.copy_from_slice(halves.as_flattened());
            Vmcall::FatalError { code, text }
        }),
    ]
}

proptest! {
    #[test]
    fn a_host_reads_the_call_that_the_guest_made(call in calls(), wide: bool) {
        let gpaw = if wide { Gpaw::Bits52 } else { Gpaw::Bits48 };
        if let Ok(regs) = call.regs(gpaw) {
            prop_assert_eq!(Vmcall::from_regs(&regs, gpaw), Ok(call));
        }
    }

    #[test]
    fn what_a_host_can_read_a_guest_can_ask(registers: [u64; 16], function in 0u64..0x1_0006) {
        let regs = Regs { r10: 0, r11: function, ..Regs::from_array(registers) };
        let small = Regs {
            r12: regs.r12 % 9,
            r13: regs.r13 % 2,
            r14: SHARED + regs.r14 % 0x1_0000,
            ..regs
        };
        for regs in [regs, small] {
            if let Ok(call) = Vmcall::from_regs(&regs, Gpaw::Bits48) {
                prop_assert!(call.regs(Gpaw::Bits48).is_ok(), "{:?}", call);
            }
        }
    }

    #[test]
    fn registers_go_through_their_array(registers: [u64; 16]) {
        let regs = Regs::from_array(registers);
        prop_assert_eq!(Regs::from_array(regs.to_array()), regs);
        prop_assert_eq!((regs.rax, regs.rbx, regs.rsi, regs.r15),
            (registers[0], registers[3], registers[6], registers[15]));
    }

    #[test]
    fn a_quote_header_goes_through_its_bytes(version: u64, status: u64, in_len: u32, out_len: u32) {
        let header = QuoteHeader { version, status: QuoteStatus(status), in_len, out_len };
        prop_assert_eq!(QuoteHeader::from_bytes(header.to_bytes()), header);
    }
}

#[test]
fn what_is_no_call_is_refused_with_the_hosts_status() {
    let refused = |regs: Regs| Vmcall::from_regs(&regs, Gpaw::Bits48).expect_err("no call");
    let call = |function, operands| Regs::vmcall(function, operands);
    let invalid = VmcallStatus::INVALID_OPERAND;
    let table = [
        (call(77, [0; 4]), VmcallStatus::SUBFUNC_UNSUPPORTED),
        (
            Regs {
                r10: 1,
                ..call(10, [0; 4])
            },
            VmcallStatus::SUBFUNC_UNSUPPORTED,
        ),
        (call(30, [8, 0, 0x60, 0]), invalid),
        (call(30, [1, 2, 0x60, 0]), invalid),
        (call(30, [1, 0, 0x1_0000, 0]), invalid),
        (call(48, [4, 0, 0x1000, 0]), invalid),
        (call(48, [4, 0, SHARED | 0xFFE, 0]), invalid),
        (call(0x1_0004, [31, 0, 0, 0]), invalid),
        (call(0x1_0002, [0x4000, 0x1000, 0, 0]), invalid),
        (call(0x1_0002, [SHARED | 0x4000, 0, 0, 0]), invalid),
        (
            call(0x1_0002, [SHARED | 0x4000, 0x800, 0, 0]),
            VmcallStatus::ALIGN_ERROR,
        ),
    ];
    for (regs, status) in table {
        assert_eq!(refused(regs), status, "{regs:x?}");
    }
}
