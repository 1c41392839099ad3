//! Memory that an embedder brings along, of whatever kind, under a machine: the guest and the embedder see
//! the same bytes, and the memory stays until the machine is gone.

use std::sync::Arc;

use kvm_ops::guest::{Action, FnProgram, Outcome};
use kvm_ops::kvm::KvmHost;
use kvm_ops::sim::SimHost;
use kvm_ops::{Gfn, Gpa, Host, Kind, Privacy, SharedMask, Tech, Vendor};
use kvm_ops_machine::{
    ConsoleSink, End, GuestRam, Image, Machine, MachineConfig, MemoryRegion, RunLimits,
};
use memmap2::{MmapOptions, MmapRaw};
// A version that the library is not built with.
use vm_memory_old::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

const BYTES: u64 = 4 << 20;
/// The page of the embedder's question, and the one of the guest's answer.
const QUESTION: Gpa = Gpa::new(0x1000);
const ANSWER: Gpa = Gpa::new(0x1f_f000);

/// An embedder's own view of its memory.
trait View {
    fn put(&self, at: Gpa, data: &[u8]);
    fn get(&self, at: Gpa) -> [u8; 8];
}

impl View for GuestMemoryMmap<()> {
    fn put(&self, at: Gpa, data: &[u8]) {
        self.write_slice(data, GuestAddress(at.get())).unwrap();
    }

    fn get(&self, at: Gpa) -> [u8; 8] {
        self.read_obj(GuestAddress(at.get())).unwrap()
    }
}

/// The adapter from the documentation of `MemoryRegion`, for two regions.
fn old_vm_memory() -> (GuestMemoryMmap<()>, GuestRam) {
    let halves = [
        (GuestAddress(0), 0x10_0000),
        (GuestAddress(0x10_0000), 0x30_0000),
    ];
    let theirs = GuestMemoryMmap::<()>::from_ranges(&halves).unwrap();
    let owner = Arc::new(theirs.clone());
    let regions = theirs.iter().map(|region| {
        let (gpa, host) = (Gpa::new(region.start_addr().0), region.as_ptr());
        // SAFETY: `owner` keeps the mapping, and vm-memory makes no reference to its bytes.
        unsafe { MemoryRegion::new(gpa, host, region.len(), owner.clone()) }.unwrap()
    });
    let ram = GuestRam::from_regions(regions).unwrap();
    assert_eq!(ram.regions().count(), 2);
    (theirs, ram)
}

/// A file that is mapped twice, as two processes do.
struct File(MmapRaw);

impl View for File {
    fn put(&self, at: Gpa, data: &[u8]) {
        // SAFETY: the range lies in the mapping, which `self` keeps, and there is no reference to it.
        unsafe { kvm_ops::volatile::copy_to(self.0.as_mut_ptr().add(at.get() as usize), data) };
    }

    fn get(&self, at: Gpa) -> [u8; 8] {
        let mut data = [0; 8];
        // SAFETY: as in `put`.
        unsafe { kvm_ops::volatile::copy_from(self.0.as_ptr().add(at.get() as usize), &mut data) };
        data
    }
}

fn file() -> (File, GuestRam) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(BYTES).unwrap();
    let map = || MmapOptions::new().map_raw(&file).unwrap();
    let guests = map();
    let host = guests.as_mut_ptr();
    // SAFETY: the region keeps the mapping, and there is no reference to its bytes.
    let region = unsafe { MemoryRegion::new(Gpa::new(0), host, BYTES, Arc::new(guests)) };
    (
        File(map()),
        GuestRam::from_regions([region.unwrap()]).unwrap(),
    )
}

/// Shares the two pages, which a normal VM refuses, reads the question and answers it.
fn guest() -> FnProgram<impl FnMut(Outcome<'_>) -> Action<'static> + Send> {
    let mut step = 0;
    let mut mask = SharedMask::NONE;
    let mut answer: &'static [u8] = &[];
    FnProgram(move |outcome: Outcome<'_>| {
        match outcome {
            Outcome::Start { mask: ours, .. } => mask = ours,
            Outcome::Data(data) => answer = Box::leak(data.iter().rev().copied().collect()),
            _ => {}
        }
        // A normal VM has one kind of memory.
        let at = |gpa| {
            mask.join(Gfn::containing(gpa), Privacy::Shared)
                .unwrap_or(gpa)
        };
        let share = |gpa| Action::Share { gpa, pages: 1 };
        step += 1;
        match step {
            1 => share(QUESTION),
            2 => share(ANSWER),
            3 => Action::Read {
                gpa: at(QUESTION),
                len: 8,
            },
            4 => Action::Write {
                gpa: at(ANSWER),
                data: answer,
            },
            _ => Action::Shutdown,
        }
    })
}

fn question_and_answer(vendor: Vendor, kind: Kind, view: &dyn View, ram: GuestRam) {
    let config = MachineConfig::new()
        .kind(kind)
        .guest_ram(ram)
        .program(guest());
    let mut machine = Machine::build(&SimHost::new(vendor), config).unwrap();
    view.put(QUESTION, b"question");
    let devices = machine.devices(ConsoleSink::discard());
    let report = machine.run(&devices, RunLimits::none()).unwrap();
    assert_eq!(report.end, End::Shutdown, "{kind:?}");
    assert_eq!(&view.get(ANSWER), b"noitseuq", "{kind:?}");
    assert!(machine.destroy().is_clean());
    assert_eq!(
        &view.get(ANSWER),
        b"noitseuq",
        "the memory is the embedder's"
    );
}

#[test]
fn every_kind_of_vm_runs_on_memory_of_another_version_of_vm_memory_and_on_a_file() {
    for (vendor, kind) in [
        (Vendor::Intel, Kind::Normal),
        (Vendor::Intel, Kind::Of(Tech::Tdx)),
        (Vendor::Amd, Kind::Of(Tech::SevSnp)),
    ] {
        let (theirs, ram) = old_vm_memory();
        question_and_answer(vendor, kind, &theirs, ram);
        let (theirs, ram) = file();
        question_and_answer(vendor, kind, &theirs, ram);
    }
}

#[test]
fn the_memory_is_kept_until_the_machine_is_gone() {
    let (theirs, ram) = old_vm_memory();
    let region = theirs.find_region(GuestAddress(0)).unwrap();
    assert_eq!(region.len(), 0x10_0000);
    let host = SimHost::new(Vendor::Intel);
    let machine = Machine::build(&host, MachineConfig::new().guest_ram(ram)).unwrap();
    drop(theirs);
    machine.memory().write(QUESTION, b"mapped").unwrap();
    assert!(machine.destroy().is_clean());
}

/// An image is loaded into the embedder's memory, whatever it held, and machine code runs there.
fn code(host: &impl Host, theirs: &GuestMemoryMmap<()>, ram: GuestRam) {
    let dirty = vec![0xa5; 0x10_0000];
    theirs.write_slice(&dirty, GuestAddress(0)).unwrap();
    // mov byte [0x6000], 0x2a; hlt
    let image = Image::flat("code", [0xc6, 0x06, 0x00, 0x60, 0x2a, 0xf4]);
    let config = MachineConfig::new().guest_ram(ram).image(image);
    let mut machine = Machine::build(host, config).unwrap();
    let devices = machine.devices(ConsoleSink::discard());
    let report = machine.run(&devices, RunLimits::none()).unwrap();
    assert_eq!(report.end, End::Halted);
    assert_eq!(theirs.get(Gpa::new(0x6000))[..2], [0x2a, 0xa5]);
    assert!(machine.destroy().is_clean());
}

#[test]
fn machine_code_runs_in_memory_of_another_version_of_vm_memory() {
    match KvmHost::open() {
        Ok(host) => {
            let (theirs, ram) = old_vm_memory();
            code(&host, &theirs, ram);
        }
        Err(error) => eprintln!("skipped: no /dev/kvm: {error}"),
    }
}

#[test]
fn memory_of_the_version_of_the_feature_needs_no_adapter() {
    use vm_memory::{Bytes as _, GuestMemoryMmap};

    struct New(GuestMemoryMmap<()>);

    impl View for New {
        fn put(&self, at: Gpa, data: &[u8]) {
            self.0
                .write_slice(data, vm_memory::GuestAddress(at.get()))
                .unwrap();
        }

        fn get(&self, at: Gpa) -> [u8; 8] {
            self.0.read_obj(vm_memory::GuestAddress(at.get())).unwrap()
        }
    }

    let ranges = [(vm_memory::GuestAddress(0), BYTES as usize)];
    let theirs = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    let ram = GuestRam::from_vm_memory(&theirs).unwrap();
    question_and_answer(Vendor::Intel, Kind::Of(Tech::Tdx), &New(theirs), ram);
}
