//! A TD on the software machine, with memory to share and programs that tell what became of them.

// Each test file uses a part.
#![allow(dead_code, unreachable_pub)]

use std::sync::mpsc;

use kvm_ops_core::guest::{Action, GuestProgram, Outcome, Script};
use kvm_ops_core::{
    Backend, EncParams, FreeReport, Gfn, Gpa, Host, HostRange, Irqchip, MemSlot, Pfn, Privacy,
    PrivateSpte, SlotId, TdParams, VcpuId, VcpuOps, Vendor, VmOps, VmParams,
};
use kvm_ops_sim::SimHost;
use kvm_ops_tdx::{TdxVcpu, TdxVm};
use vm_memory::MmapRegion;

pub type Vcpu = TdxVcpu<SimHost>;

/// Loads a guest program, as a host that runs programs allows.
pub trait Load {
    fn load(&mut self, program: Box<dyn GuestProgram>);
}

impl Load for Vcpu {
    fn load(&mut self, program: Box<dyn GuestProgram>) {
        let programs = self.programs().expect("the software machine runs programs");
        programs.load_program(program).unwrap();
    }
}

/// The data of an exit as 64-bit words.
pub fn words(data: &[u8]) -> Vec<u64> {
    let words = data.chunks_exact(8);
    words
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
        .collect()
}

/// The shared bit of a TD whose addresses have 48 bits.
pub const SHARED: u64 = 1 << 47;
pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;

/// Statuses of TDG.VP.VMCALL.
pub const RETRY: u64 = 1;
pub const INVALID_OPERAND: u64 = 1 << 63;
pub const ALIGN_ERROR: u64 = 1 << 63 | 2;
pub const SUBFUNC_UNSUPPORTED: u64 = 1 << 63 | 3;

/// Memory that the host lends, kept until the end of the test.
pub struct Ram(MmapRegion<()>);

impl Ram {
    pub fn new(bytes: u64) -> Self {
        Self(MmapRegion::new(bytes as usize).unwrap())
    }

    pub fn slot(&self, id: u32, gpa: u64) -> MemSlot {
        // SAFETY: the tests drop their TDs before their `Ram`, and use its memory only by the
        // volatile copies below.
        let range = unsafe { HostRange::new(self.0.as_ptr() as u64, self.0.size() as u64) };
        MemSlot::new(SlotId(id), Gpa::new(gpa), range.unwrap())
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        assert!(at as usize + len <= self.0.size());
        (at as usize..at as usize + len)
            // SAFETY: mapped for as long as `self`, and the range lies in it.
            .map(|i| unsafe { self.0.as_ptr().add(i).read_volatile() })
            .collect()
    }

    pub fn write(&self, at: u64, data: &[u8]) {
        assert!(at as usize + data.len() <= self.0.size());
        for (i, byte) in data.iter().enumerate() {
            // SAFETY: mapped for as long as `self`, and the range lies in it.
            unsafe { self.0.as_ptr().add(at as usize + i).write_volatile(*byte) };
        }
    }
}

/// A runnable TD. Fields are dropped in this order.
pub struct Td {
    pub vcpus: Vec<Vcpu>,
    pub vm: TdxVm<SimHost>,
    pub host: SimHost,
    pub ram: Ram,
}

/// The parameters of a TD.
pub struct Made {
    pub host: SimHost,
    pub vcpus: u32,
    pub irqchip: Irqchip,
    pub td: TdParams,
    pub ram_bytes: u64,
}

impl Default for Made {
    fn default() -> Self {
        Self {
            host: SimHost::new(Vendor::Intel),
            vcpus: 1,
            irqchip: Irqchip::None,
            td: TdParams::default(),
            ram_bytes: 8 * MIB,
        }
    }
}

impl Made {
    pub fn td(self) -> Td {
        let Self {
            host,
            vcpus,
            irqchip,
            td,
            ram_bytes,
        } = self;
        let params = VmParams {
            vcpus,
            irqchip,
            enc: EncParams::Td(Box::new(td)),
        };
        let ram = Ram::new(ram_bytes);
        let mut vm = TdxVm::create(&host, host.next_vm_id(), &params).unwrap();
        vm.vm_init().unwrap();
        vm.set_memory_slot(&ram.slot(0, 0)).unwrap();
        let vcpus = (0..vcpus)
            .map(|id| vm.create_vcpu(VcpuId(id)).unwrap())
            .collect();
        vm.vm_finalize().unwrap();
        Td {
            vcpus,
            vm,
            host,
            ram,
        }
    }
}

/// A TD of one vCPU that runs `script`, and what becomes of the actions.
pub fn td(script: Script) -> (Td, Transcript) {
    Made::default().td().running(script)
}

impl Td {
    pub fn running(mut self, script: Script) -> (Self, Transcript) {
        let (program, transcript) = transcript(script);
        self.vcpus[0].load(Box::new(program));
        (self, transcript)
    }

    pub fn vcpu(&mut self) -> &mut Vcpu {
        &mut self.vcpus[0]
    }

    /// Converts a range as an embedder does that answers a MapGPA.
    pub fn convert(&self, gpa: Gpa, pages: u64, to: Privacy) {
        convert(&self.vm, gpa, pages, to);
    }

    /// The host page of a private frame.
    pub fn private_page(&self, gfn: u64) -> Option<Pfn> {
        let mut found = None;
        self.vm.for_each_private(|at, _, spte| {
            if let (true, PrivateSpte::Mapped(page)) = (at == Gfn::new(gfn), spte) {
                found = Some(page);
            }
        });
        found
    }

    /// The number of times a leaf returned this status.
    pub fn calls(&self, leaf: &str, status: &str) -> u64 {
        self.host.tdx_platform().unwrap().counts().of(leaf, status)
    }

    /// The number of SEAMCALLs and TDCALLs.
    pub fn all_calls(&self) -> u64 {
        self.host.tdx_platform().unwrap().counts().total()
    }

    /// Tears it down; nothing may stay.
    pub fn destroy(self) {
        let Self {
            vcpus,
            vm,
            host,
            ram,
        } = self;
        drop(vcpus);
        let report = destroy(vm);
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(host.pages().unwrap().frames_out(), 0);
        assert_eq!(host.live_vms(), 0);
        drop(ram);
    }
}

pub fn convert(vm: &TdxVm<SimHost>, gpa: Gpa, pages: u64, to: Privacy) {
    let done = vm.set_memory_attributes(Gfn::containing(gpa), pages, to);
    assert_eq!(done, Ok(pages));
}

/// The whole teardown.
pub fn destroy(mut vm: TdxVm<SimHost>) -> FreeReport {
    let key = vm.mmu_release_hkid().unwrap();
    let drained = vm.drain_private(key).map_err(|(error, _)| error).unwrap();
    vm.vm_free(drained)
}

/// The outcomes of a program's actions, in words.
pub struct Transcript(mpsc::Receiver<String>);

impl Transcript {
    /// All since the last look, without the start.
    pub fn all(&self) -> Vec<String> {
        self.0
            .try_iter()
            .filter(|line| !line.starts_with("Start"))
            .collect()
    }

    /// All are this, and so many.
    #[track_caller]
    pub fn expect<S: AsRef<str>>(&self, expected: impl IntoIterator<Item = S>) {
        let expected: Vec<String> = expected.into_iter().map(|s| s.as_ref().into()).collect();
        assert_eq!(self.all(), expected);
    }
}

struct Recorded<P>(P, mpsc::Sender<String>);

impl<P: GuestProgram> GuestProgram for Recorded<P> {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        // A test that is over does not listen any more.
        let _ = self.1.send(format!("{last:?}"));
        self.0.step(last)
    }
}

pub fn transcript(program: impl GuestProgram) -> (impl GuestProgram, Transcript) {
    let (sender, transcript) = mpsc::channel();
    (Recorded(program, sender), Transcript(transcript))
}

/// `Values([..])` of a TDG.VP.VMCALL whose R10 is `status` and whose other registers are these.
pub fn values(values: [u64; 6]) -> String {
    format!("Values({values:?})")
}

/// A program's answer that the host refused.
pub fn refused(status: u64) -> String {
    format!("Fault(Refused({status}))")
}
