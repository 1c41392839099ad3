//! TDs: their commands, and what calls refuse them.

use crate::common::World;
use crate::common::td::{entry, init_args, with_list};
use crate::support::*;
use crate::td_guest::{MAP_GPA, SHARED, Td, call as vmcall};
use kvm_ops::sim::SimHost;
use kvm_ops::{Host, Level, PagePort, Vendor};
use kvm_ops_softkvm::{Kernel, Process};
use kvm_ops_uapi::checks::*;
use kvm_ops_uapi::run::{Hypercall, exit_reason};
use kvm_ops_uapi::system::{CpuidEntry2, vm_type};
use kvm_ops_uapi::tdx::{self as uapi, TdxCapabilities, TdxCmd, TdxInitVm};
use kvm_ops_uapi::{U32, U64, ioctl};
use zerocopy::IntoBytes;

type Answer = crate::common::Answer;

const PAGE: u64 = 4096;

/// INIT_VM with a mistake.
pub(crate) fn init_with(
    change: impl FnOnce(&mut TdxInitVm, &mut Vec<CpuidEntry2>),
) -> (World, Answer) {
    let w = World::intel();
    let mut args = init_args();
    change(&mut args.0, &mut args.1);
    let vm = w.td_vm();
    let answer = w.init_vm(vm, &args).0;
    (w, answer)
}

fn init_head(change: impl FnOnce(&mut TdxInitVm)) -> Answer {
    init_with(|head, _| change(head)).1
}

/// INIT_VM with another list.
fn init_list(list: &[CpuidEntry2]) -> Answer {
    let change = |head: &mut TdxInitVm, old: &mut Vec<CpuidEntry2>| {
        *old = list.to_vec();
        head.nent = U32::new(list.len() as u32);
    };
    init_with(change).1
}

fn width(bits: u32) -> CpuidEntry2 {
    entry(0x8000_0008, 0, [bits << 16, 0, 0, 0])
}

/// A command's structure with a mistake.
fn frame(w: &World, fd: i32, id: u32, hw_error: u64) -> Answer {
    let cmd = TdxCmd {
        id: U32::new(id),
        hw_error: U64::new(hw_error),
        ..TdxCmd::default()
    };
    w.call(fd, ioctl::KVM_MEMORY_ENCRYPT_OP, &cmd)
}

fn capabilities(flags: u32, change: impl FnOnce(&mut TdxCapabilities)) -> Answer {
    let w = World::intel();
    let mut args = TdxCapabilities {
        nent: U32::new(256),
        ..TdxCapabilities::default()
    };
    change(&mut args);
    let at = w.task.put(&args);
    w.tdx(w.td_vm(), uapi::CAPABILITIES, flags, at).0
}

/// INIT_MEM_REGION of one page of a private slot at 1 MiB, with a mistake.
fn region_with(flags: u32, place: impl FnOnce(u64) -> (u64, u64, u64)) -> Answer {
    let w = World::intel();
    let vm = w.td();
    w.private_slot(vm, 1, 0x10_0000, 0x20_0000);
    let vcpu = w.td_vcpu(vm, 0, 0);
    w.add_memory(vcpu, flags, place(w.task.map(4096))).0
}

/// The same after a change of the VM.
fn region_after(change: impl FnOnce(&World, i32, i32) -> Answer) -> Answer {
    let w = World::intel();
    let vm = w.td();
    let (gmem, _) = w.private_slot(vm, 1, 0x10_0000, 0x20_0000);
    let vcpu = w.td_vcpu(vm, 0, 0);
    change(&w, vm, gmem)?;
    w.add_memory(vcpu, 0, (w.task.map(4096), 0x10_0000, 1)).0
}

/// A vCPU of a TD that the module does not have yet.
fn vcpu_of_td(w: &World) -> i32 {
    let vcpu = w.vcpu(w.td(), 0);
    w.set_cpuid(vcpu);
    vcpu
}

/// The answer of a call while all frames of the machine are taken. It is done when they are back.
fn out_of_frames(
    prepare: impl FnOnce(&World) -> i32,
    call: impl Fn(&World, i32) -> Answer,
) -> Answer {
    let host = SimHost::new(Vendor::Intel);
    let w = World::of(&Kernel::new(host.clone()));
    let fd = prepare(&w);
    let pages = host.pages().unwrap();
    let free = |level| std::iter::from_fn(move || pages.alloc(level).ok());
    let taken: Vec<_> = free(Level::Size2M).chain(free(Level::Size4K)).collect();
    let refused = call(&w, fd);
    for page in taken {
        pages.free(page).unwrap();
    }
    call(&w, fd).expect("there are frames now");
    refused
}

pub(crate) const CASES: &[Case] = &[
    (create_vcpu::TD_INITIALIZED, |_| {
        let w = World::intel();
        w.ioctl(w.td_vm(), ioctl::KVM_CREATE_VCPU, 0)
    }),
    (create_vcpu::TD_INITIALIZED, |_| {
        let w = World::intel();
        let vm = w.td();
        w.td_vcpu(vm, 0, 0);
        w.finalize(vm).0?;
        w.ioctl(vm, ioctl::KVM_CREATE_VCPU, 1)
    }),
    (create_vcpu::TD_SPLIT_IRQCHIP, |_| {
        let w = World::intel();
        let vm = w.vm(vm_type::TDX);
        w.init_vm(vm, &init_args()).0?;
        w.ioctl(vm, ioctl::KVM_CREATE_VCPU, 0)
    }),
    (create_vcpu::COUNT, |_| {
        let w = World::intel();
        let vm = w.td();
        for id in 0..4 {
            w.vcpu(vm, id);
        }
        w.ioctl(vm, ioctl::KVM_CREATE_VCPU, 4)
    }),
    (create_irqchip::NOT_TD, |_| {
        let w = World::intel();
        w.ioctl(w.vm(vm_type::TDX), ioctl::KVM_CREATE_IRQCHIP, 0)
    }),
    (region::RANGE, |_| {
        let w = World::intel();
        let shared = kvm_ops_uapi::memory::UserspaceMemoryRegion2 {
            guest_phys_addr: U64::new((1 << 47) - 0x1f_f000),
            ..crate::common::slot()
        };
        w.region(w.td(), &shared)
    }),
    (run::INITIALIZED, |_| {
        let w = World::intel();
        w.ioctl(w.td_vcpu(w.td(), 0, 0), ioctl::KVM_RUN, 0)
    }),
    (run::INITIALIZED, |_| {
        let w = World::intel();
        let vm = w.td();
        w.td_vcpu(vm, 0, 0);
        let other = w.vcpu(vm, 1);
        w.finalize(vm).0?;
        w.call(other, ioctl::KVM_SET_MP_STATE, &0u32)?;
        w.ioctl(other, ioctl::KVM_RUN, 0)
    }),
    // Normal VMs take any answer; a TD's MapGPA has three.
    (run::COMPLETION, |_| {
        let td = Td::new(|a| vmcall(a, MAP_GPA, [SHARED | 0x10_0000, PAGE, 0, 0]));
        let td = td.with_conversions();
        let call: Hypercall = td.runs_to(exit_reason::HYPERCALL);
        td.answer(&Hypercall {
            ret: U64::new(1),
            ..call
        });
        td.run()
    }),
    (pre_fault::LAUNCHED, |_| {
        let w = World::intel();
        let vm = w.td();
        pre_fault_of(&w, vm, pre_fault_args(0, 4096, 0))
    }),
    (pre_fault::SHARED_BIT, |_| {
        let w = World::intel();
        let vm = w.td();
        let vcpu = w.td_vcpu(vm, 0, 0);
        w.finalize(vm).0?;
        let args = pre_fault_args(1 << 47, 4096, 0);
        w.call(vcpu, ioctl::KVM_PRE_FAULT_MEMORY, &args)
    }),
    (encrypt_tdx::TD, |_| {
        let w = World::intel();
        w.ioctl(w.vm(0), ioctl::KVM_MEMORY_ENCRYPT_OP, NOWHERE)
    }),
    (encrypt_tdx::COPY, |_| {
        let w = World::intel();
        w.ioctl(w.td_vm(), ioctl::KVM_MEMORY_ENCRYPT_OP, NOWHERE)
    }),
    (encrypt_tdx::HW_ERROR, |_| {
        let w = World::intel();
        frame(&w, w.td_vm(), 99, 1)
    }),
    (encrypt_tdx::SIGNAL, |_| {
        let w = World::intel();
        let vm = w.td_vm();
        interrupted(&w, || frame(&w, vm, 99, 0))
    }),
    (encrypt_tdx::KNOWN, |_| {
        let w = World::intel();
        frame(&w, w.td_vm(), uapi::INIT_VCPU, 0)
    }),
    (encrypt_tdx::COPY_BACK, |_| {
        let w = World::intel();
        let vm = w.td_vm();
        let (head, list) = init_args();
        let cmd = TdxCmd {
            id: U32::new(uapi::INIT_VM),
            data: U64::new(w.task.put(&with_list(&head, &list)[..])),
            ..TdxCmd::default()
        };
        let refused = w.ioctl(vm, ioctl::KVM_MEMORY_ENCRYPT_OP, sealed(&w, &cmd));
        let again = w.init_vm(vm, &init_args()).0;
        let again = again.map_err(|refusal| refusal.check());
        assert_eq!(again, Err(Some(tdx_init_vm::ONCE)), "the command was done");
        refused
    }),
    (encrypt_tdx_vcpu::TD, |_| {
        let w = World::intel();
        w.ioctl(w.vcpu(w.vm(0), 0), ioctl::KVM_MEMORY_ENCRYPT_OP, NOWHERE)
    }),
    (encrypt_tdx_vcpu::COPY, |_| {
        let w = World::intel();
        w.ioctl(w.vcpu(w.td(), 0), ioctl::KVM_MEMORY_ENCRYPT_OP, NOWHERE)
    }),
    (encrypt_tdx_vcpu::HW_ERROR, |_| {
        let w = World::intel();
        frame(&w, w.vcpu(w.td(), 0), 99, 1)
    }),
    (encrypt_tdx_vcpu::STATE, |_| {
        let w = World::intel();
        let vm = w.td();
        let vcpu = w.td_vcpu(vm, 0, 0);
        w.finalize(vm).0?;
        frame(&w, vcpu, uapi::GET_CPUID, 0)
    }),
    (encrypt_tdx_vcpu::KNOWN, |_| {
        let w = World::intel();
        frame(&w, w.vcpu(w.td(), 0), uapi::FINALIZE_VM, 0)
    }),
    (tdx_capabilities::FLAGS, |_| {
        capabilities(1, |args| args.nent = U32::ZERO)
    }),
    (tdx_capabilities::NENT, |_| {
        let w = World::intel();
        w.tdx(w.td_vm(), uapi::CAPABILITIES, 0, NOWHERE).0
    }),
    (tdx_capabilities::ROOM, |_| {
        capabilities(0, |args| args.nent = U32::new(17))
    }),
    (tdx_capabilities::MEMORY, |_| {
        let call = |w: &World, vm: &i32| {
            let args = TdxCapabilities {
                nent: U32::new(256),
                ..TdxCapabilities::default()
            };
            let room = w
                .task
                .map(size_of_val(&args) + 256 * size_of::<CpuidEntry2>());
            w.task.write(room, args.as_bytes()).unwrap();
            w.tdx(*vm, uapi::CAPABILITIES, 0, room).0
        };
        short_of_memory(Vendor::Intel, tdx_capabilities::MEMORY, |w| w.td_vm(), call)
    }),
    // The room that is promised is not there.
    (tdx_capabilities::COPY_BACK, |_| capabilities(0, |_| ())),
    (tdx_init_vm::ONCE, |_| {
        let w = World::intel();
        w.tdx(w.td(), uapi::INIT_VM, 1, NOWHERE).0
    }),
    (tdx_init_vm::FLAGS, |_| {
        let w = World::intel();
        w.tdx(w.td_vm(), uapi::INIT_VM, 1, NOWHERE).0
    }),
    (tdx_init_vm::NENT, |_| {
        let w = World::intel();
        w.tdx(w.td_vm(), uapi::INIT_VM, 0, NOWHERE).0
    }),
    (tdx_init_vm::COUNT, |_| {
        init_head(|head| head.nent = U32::new(257))
    }),
    (tdx_init_vm::COPY, |_| {
        init_head(|head| head.nent = U32::new(256))
    }),
    (tdx_init_vm::RESERVED, |_| {
        init_head(|head| head.reserved[11] = U64::new(1))
    }),
    (tdx_init_vm::PADDING, |_| {
        init_head(|head| head.padding = U32::new(1))
    }),
    (tdx_init_vm::ATTRIBUTES, |_| {
        init_head(|head| head.attributes = U64::new(1))
    }),
    (tdx_init_vm::XFAM, |_| {
        init_head(|head| head.xfam = U64::new(1 << 5))
    }),
    (tdx_init_vm::WIDTH, |_| init_list(&[])),
    (tdx_init_vm::WIDTH, |_| init_list(&[width(47)])),
    // Not configurable, twice the same, and a feature that KVM keeps from TDs.
    (tdx_init_vm::LEAVES, |_| {
        init_list(&[width(48), entry(2, 0, [0; 4])])
    }),
    (tdx_init_vm::LEAVES, |_| init_list(&[width(48), width(48)])),
    (tdx_init_vm::LEAVES, |_| {
        init_list(&[width(48), entry(7, 0, [0, 1 << 11, 0, 0])])
    }),
    (tdx_init_vm::KEY_ID, |_| {
        // The module has the first KeyID, and the first TD the other.
        let setup = SimHost::default_tdx().keyids(6, (62, 63), 62);
        let host = SimHost::builder(Vendor::Intel).tdx(setup).build().unwrap();
        let w = World::of(&Kernel::new(host));
        let (first, second) = (w.td(), w.td_vm());
        let refused = w.init_vm(second, &init_args()).0;
        w.task.close(first)?;
        w.init_vm(second, &init_args())
            .0
            .expect("the KeyID is free");
        refused
    }),
    (tdx_init_vm::MEMORY, |_| {
        let prepare = |w: &World| w.td_vm();
        let call = |w: &World, vm: &i32| w.init_vm(*vm, &init_args()).0;
        short_of_memory(Vendor::Intel, tdx_init_vm::MEMORY, prepare, call)
    }),
    (tdx_init_vm::MEMORY, |_| {
        out_of_frames(|w| w.td_vm(), |w, vm| w.init_vm(vm, &init_args()).0)
    }),
    (tdx_init_vcpu::MEMORY, |_| {
        let call = |w: &World, vcpu: &i32| w.tdx(*vcpu, uapi::INIT_VCPU, 0, 0).0;
        short_of_memory(Vendor::Intel, tdx_init_vcpu::MEMORY, vcpu_of_td, call)
    }),
    (tdx_init_vcpu::MEMORY, |_| {
        out_of_frames(vcpu_of_td, |w, vcpu| w.tdx(vcpu, uapi::INIT_VCPU, 0, 0).0)
    }),
    (tdx_init_vcpu::FLAGS, |_| {
        let w = World::intel();
        w.tdx(w.vcpu(w.td(), 0), uapi::INIT_VCPU, 1, 0).0
    }),
    (tdx_init_vcpu::ONCE, |_| {
        let w = World::intel();
        w.tdx(w.td_vcpu(w.td(), 0, 0), uapi::INIT_VCPU, 0, 0).0
    }),
    (tdx_init_vcpu::X2APIC, |_| {
        let w = World::intel();
        w.tdx(w.vcpu(w.td(), 0), uapi::INIT_VCPU, 0, 0).0
    }),
    (tdx_init_mem_region::VCPU, |_| {
        let w = World::intel();
        w.tdx(w.vcpu(w.td(), 0), uapi::INIT_MEM_REGION, 2, NOWHERE)
            .0
    }),
    (tdx_init_mem_region::FLAGS, |_| {
        region_with(2, |_| (1, 1, 0))
    }),
    (tdx_init_mem_region::COPY, |_| {
        let w = World::intel();
        w.tdx(w.td_vcpu(w.td(), 0, 0), uapi::INIT_MEM_REGION, 1, NOWHERE)
            .0
    }),
    (tdx_init_mem_region::SOURCE, |_| {
        region_with(0, |_| (0, 0x10_0000, 1))
    }),
    (tdx_init_mem_region::SOURCE, |_| {
        region_with(0, |source| (source + 1, 0x10_0000, 1))
    }),
    (tdx_init_mem_region::RANGE, |_| {
        region_with(0, |source| (source, 0x10_0001, 1))
    }),
    (tdx_init_mem_region::RANGE, |_| {
        region_with(0, |source| (source, 0x10_0000, 0))
    }),
    (tdx_init_mem_region::RANGE, |_| {
        region_with(0, |source| (source, 0x10_0000, 1 << 52))
    }),
    (tdx_init_mem_region::RANGE, |_| {
        region_with(0, |source| (source, !0xfff, 1))
    }),
    (tdx_init_mem_region::RANGE, |_| {
        region_with(0, |source| (source, 1 << 47, 1))
    }),
    (tdx_init_mem_region::RANGE, |_| {
        region_with(0, |source| (source, (1 << 47) - PAGE, 2))
    }),
    (tdx_init_mem_region::SIGNAL, |_| {
        let w = World::intel();
        let vcpu = w.td_vcpu(w.td(), 0, 0);
        let place = (w.task.map(4096), 0x10_0000, 1);
        interrupted(&w, || w.add_memory(vcpu, 0, place).0)
    }),
    (tdx_init_mem_region::SLOT, |_| {
        region_with(0, |source| (source, 0, 1))
    }),
    (tdx_init_mem_region::SLOT, |_| {
        region_after(|w, vm, _| {
            let mut region = crate::common::slot();
            region.memory_size = U64::ZERO;
            w.region(vm, &region)?;
            w.region(vm, &crate::common::slot())
        })
    }),
    (tdx_init_mem_region::FILE, |_| {
        region_after(|w, _, gmem| w.task.close(gmem).map(|()| 0))
    }),
    (tdx_init_mem_region::CONTENTS, |_| {
        region_with(0, |_| (0x1000, 0x10_0000, 1))
    }),
    (tdx_init_mem_region::PRIVATE, |_| {
        region_after(|w, vm, _| {
            w.set_private(vm, 0x10_0000, PAGE, false);
            Ok(0)
        })
    }),
    (tdx_init_mem_region::TWICE, |_| {
        let w = World::intel();
        let vm = w.td();
        w.private_slot(vm, 1, 0x10_0000, 0x20_0000);
        let (vcpu, place) = (w.td_vcpu(vm, 0, 0), (w.task.map(4096), 0x10_0000, 1));
        w.add_memory(vcpu, 1, place).0?;
        w.add_memory(vcpu, 1, place).0
    }),
    (tdx_finalize_vm::STATE, |_| {
        let w = World::intel();
        w.finalize(w.td_vm()).0
    }),
    (tdx_finalize_vm::STATE, |_| {
        let w = World::intel();
        let vm = w.td();
        w.td_vcpu(vm, 0, 0);
        w.finalize(vm).0?;
        w.finalize(vm).0
    }),
    (tdx_get_cpuid::COPY, |_| {
        let w = World::intel();
        w.tdx(w.vcpu(w.td(), 0), uapi::GET_CPUID, 0, NOWHERE).0
    }),
    (tdx_get_cpuid::ROOM, |_| {
        let w = World::intel();
        let at = w.task.put(&[0u32; 2]);
        w.tdx(w.vcpu(w.td(), 0), uapi::GET_CPUID, 0, at).0
    }),
    (tdx_get_cpuid::COPY_BACK, |_| {
        let w = World::intel();
        let at = w.task.put(&[256u32, 0]);
        w.tdx(w.vcpu(w.td(), 0), uapi::GET_CPUID, 0, at).0
    }),
];
