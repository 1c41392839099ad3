//! Random calls: any number, any argument, descriptors of every kind, structures of random bytes, from
//! several threads. No panic, and nothing left when the process is over.

mod common;

use std::thread;

use common::World;
use kvm_ops::Vendor;
use kvm_ops::sim::SimHost;
use kvm_ops_softkvm::Kernel;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::sev::SevCmd;
use kvm_ops_uapi::tdx::TdxCmd;
use kvm_ops_uapi::vm::EnableCap;
use kvm_ops_uapi::{U32, U64, cap};
use proptest::prelude::*;
use zerocopy::{FromZeros, IntoBytes};

/// Numbers that calls tell apart.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..8u64,
        2 => Just(0x1000),
        2 => Just(0x20_0000),
        1 => Just(1 << 52),
        1 => Just(!0xfff),
        1 => Just(u64::MAX),
        1 => Just(1 << 63),
        2 => 3..30u64,
        1 => any::<u64>(),
    ]
}

#[derive(Clone, Debug)]
enum Argument {
    Value(u64),
    /// A structure of such words.
    Words(Vec<u64>),
    /// A SEV command: its number, its structure, and which descriptor is its sev_fd.
    Command(u32, Vec<u64>, u32),
    /// A TDX command: its number, its flags and its structure.
    Tdx(u32, u32, Vec<u64>),
    Enable(u32, u64),
}

fn argument() -> impl Strategy<Value = Argument> {
    let words = || proptest::collection::vec(number(), 1..24);
    let command = prop_oneof![0..23u32, 100..104u32];
    let caps = prop_oneof![
        Just(cap::VM_MOVE_ENC_CONTEXT_FROM),
        Just(cap::VM_COPY_ENC_CONTEXT_FROM),
        Just(cap::SPLIT_IRQCHIP),
        Just(cap::MAX_VCPU_ID),
        any::<u32>(),
    ];
    prop_oneof![
        number().prop_map(Argument::Value),
        words().prop_map(Argument::Words),
        (command, words(), 3..6u32).prop_map(|(id, words, fd)| Argument::Command(id, words, fd)),
        (0..7u32, 0..3u32, words()).prop_map(|(id, flags, words)| Argument::Tdx(id, flags, words)),
        (caps, 3..40u64).prop_map(|(cap, value)| Argument::Enable(cap, value)),
    ]
}

#[derive(Clone, Debug)]
struct Call {
    fd: i32,
    ioctl: Ioctl,
    argument: Argument,
}

fn call() -> impl Strategy<Value = Call> {
    let ioctls = prop_oneof![
        3 => Just(ioctl::KVM_CREATE_VM),
        2 => Just(ioctl::KVM_CREATE_VCPU),
        6 => Just(ioctl::KVM_MEMORY_ENCRYPT_OP),
        3 => Just(ioctl::KVM_ENABLE_CAP),
        8 => proptest::sample::select(ioctl::ALL),
    ];
    (3..40i32, ioctls, argument()).prop_map(|(fd, ioctl, argument)| Call {
        fd,
        ioctl,
        argument,
    })
}

fn make(w: &World, call: &Call) {
    let address = match &call.argument {
        Argument::Value(value) => *value,
        Argument::Words(words) => w.task.put(&words[..]),
        Argument::Command(id, words, sev_fd) => {
            let data = w.task.put(&words[..]);
            let cmd = SevCmd {
                id: U32::new(*id),
                data: U64::new(data),
                sev_fd: U32::new(*sev_fd),
                ..SevCmd::new_zeroed()
            };
            w.task.put(&cmd)
        }
        Argument::Tdx(id, flags, words) => w.task.put(&TdxCmd {
            id: U32::new(*id),
            flags: U32::new(*flags),
            data: U64::new(w.task.put(&words[..])),
            ..TdxCmd::default()
        }),
        Argument::Enable(cap, value) => {
            let mut args = EnableCap::new_zeroed();
            args.cap = U32::new(*cap);
            args.args[0] = U64::new(*value);
            w.task.put(args.as_bytes())
        }
    };
    // Any answer is one; EMFILE ends nothing.
    let _ = w.ioctl(call.fd, call.ioctl, address);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_calls_of_several_threads_leave_nothing(
        vendor in prop_oneof![Just(Vendor::Amd), Just(Vendor::Intel)],
        threads in proptest::collection::vec(proptest::collection::vec(call(), 0..80), 1..4),
        closed in proptest::collection::vec(3..40i32, 0..20),
    ) {
        let host = SimHost::new(vendor);
        let w = World::of(&Kernel::new(host.clone()));
        w.task.limit_descriptors(40);
        // Guests in several steps of their lives, for the calls to meet.
        if vendor == Vendor::Amd {
            let guests = [w.guest(2), w.guest(3), w.guest(4), w.late_guest(false)];
            w.launch(guests[0], 0);
            w.launch_snp(guests[2]);
        } else {
            let (waits, builds, runs) = (w.td_vm(), w.td(), w.td());
            w.private_slot(builds, 1, 0, 0x20_0000);
            w.td_vcpu(builds, 0, 0);
            w.private_slot(runs, 1, 0, 0x20_0000);
            w.td_vcpu(runs, 0, 0);
            w.finalize(runs).0.unwrap();
            w.enable(waits, cap::EXIT_HYPERCALL, 1 << 12).unwrap();
        }
        thread::scope(|scope| {
            for calls in &threads {
                let w = &w;
                scope.spawn(move || calls.iter().for_each(|call| make(w, call)));
            }
            for fd in &closed {
                let _ = w.task.close(*fd);
            }
        });
        drop(w);
        prop_assert_eq!(host.live_vms(), 0);
    }
}
