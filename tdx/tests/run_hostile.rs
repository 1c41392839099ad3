//! For any values in the registers of a TDG.VP.VMCALL, and any answers of the embedder:
//! exits are well formed, the vCPU runs on, and the TD is torn down clean.

mod run_support;

use kvm_ops_core::guest::Script;
use kvm_ops_core::{Answer, Exit, Gpa, Privacy, TdxRequest, VcpuOps};
use proptest::prelude::*;
use run_support::{Load, MIB, Made, PAGE, SHARED, transcript};

/// Numbers that mean something, beside any.
fn value() -> impl Strategy<Value = u64> {
    let edges = vec![
        0,
        1,
        SHARED,
        SHARED << 1,
        1 << 51,
        1 << 52,
        1 << 63,
        u64::MAX,
    ];
    let near = (proptest::sample::select(edges), -9..9i64)
        .prop_map(|(edge, by)| edge.wrapping_add_signed(by));
    let page = proptest::sample::select(vec![0, PAGE, 2 * MIB, SHARED, SHARED - PAGE]);
    let pages = (page, 0..2000u64).prop_map(|(at, pages)| at.wrapping_add(pages * PAGE));
    prop_oneof![4 => 0..12u64, 3 => near, 3 => pages, 1 => any::<u64>()]
}

fn function() -> impl Strategy<Value = u64> {
    let known = vec![
        10, 12, 30, 31, 32, 48, 0x10000, 0x10001, 0x10002, 0x10003, 0x10004,
    ];
    prop_oneof![8 => proptest::sample::select(known), 1 => any::<u64>()]
}

#[derive(Clone, Debug)]
enum Call {
    Tdvmcall(u64, [u64; 4]),
    Hypercall(u64, [u64; 4]),
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let args = || [value(), value(), value(), value()];
    let tdvmcall = (function(), args()).prop_map(|(f, args)| Call::Tdvmcall(f, args));
    let number = prop_oneof![Just(12), 1..20u64, any::<u64>()];
    let hypercall = (number, args()).prop_map(|(nr, args)| Call::Hypercall(nr, args));
    proptest::collection::vec(prop_oneof![5 => tdvmcall, 1 => hypercall], 1..60)
}

/// The range of an exit: whole pages below the shared bit.
fn is_range(gpa: Gpa, pages: u64) -> bool {
    let end = pages
        .checked_mul(PAGE)
        .and_then(|bytes| gpa.get().checked_add(bytes));
    gpa.is_page_aligned() && pages > 0 && end.is_some_and(|end| end <= SHARED)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_exit_is_well_formed_and_the_guest_goes_on(calls in calls(), answers in any::<u64>()) {
        let mut td = Made { ram_bytes: MIB, ..Made::default() }.td();
        let made = calls.len();
        let script = calls.into_iter().fold(Script::new(), |script, call| match call {
            Call::Tdvmcall(function, args) => script.tdvmcall(function, args),
            Call::Hypercall(nr, args) => script.hypercall(nr, args),
        });
        let (program, transcript) = transcript(script);
        td.vcpu().load(Box::new(program));
        let mut random = answers;
        let mut answer = || {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            random >> 60
        };
        loop {
            let exit = td.vcpu().vcpu_run().unwrap();
            let len = td.vcpu().exit_data().len();
            let reply = match exit {
                Exit::Shutdown => break,
                Exit::IoIn { size, count, .. } | Exit::IoOut { size, count, .. } => {
                    prop_assert!(matches!(size, 1 | 2 | 4) && count == 1);
                    prop_assert_eq!(len, usize::from(size));
                    continue;
                }
                Exit::MmioRead { gpa, len: bytes } | Exit::MmioWrite { gpa, len: bytes } => {
                    prop_assert!(matches!(bytes, 1 | 2 | 4 | 8));
                    prop_assert_eq!(len, usize::from(bytes));
                    prop_assert!(gpa.get() + u64::from(bytes) <= SHARED);
                    continue;
                }
                Exit::MapGpaRange { gpa, pages, to } => {
                    prop_assert!(is_range(gpa, pages), "{} {}", gpa, pages);
                    prop_assert!(matches!(to, Privacy::Private | Privacy::Shared));
                    // Huge ranges end here by a refusal; the rest is answered at random.
                    Answer::Value(match answer() {
                        _ if gpa.get() > 64 * MIB => 22,
                        0..=9 => 0,
                        10 | 11 => 11,
                        other => other,
                    })
                }
                Exit::Tdx(request) => {
                    match request {
                        TdxRequest::GetQuote { gpa, .. } => prop_assert!(gpa.get() < SHARED),
                        TdxRequest::SetupEventNotify { vector } => prop_assert!(vector >= 32),
                        TdxRequest::GetTdVmCallInfo { leaf } => prop_assert_eq!(leaf, 1),
                        other => prop_assert!(false, "{:?}", other),
                    }
                    Answer::Tdx { status: answer(), values: [answer(); 4] }
                }
                Exit::ReadMsr { .. } if answer() % 2 == 0 => Answer::Msr(answer()),
                Exit::ReadMsr { .. } | Exit::WriteMsr { .. } => Answer::InjectGp,
                Exit::Hypercall { .. } => Answer::Value(answer()),
                Exit::SystemEvent { kind } => {
                    prop_assert_eq!((kind, len), (7, 128));
                    continue;
                }
                // A halt ends by itself when the guest is run again, and the program repeats it:
                // it asked for it by a raw call, which is over then.
                Exit::Hlt => continue,
                other => {
                    prop_assert!(false, "{:?}", other);
                    break;
                }
            };
            td.vcpu().answer(reply).unwrap();
        }
        prop_assert_eq!(transcript.all().len(), made, "each call was answered once");
        td.destroy();
    }
}
