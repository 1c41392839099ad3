//! A guest whose pages tell which they are, and stores.
#![allow(dead_code)] // Each test file uses its part.

pub(crate) mod agent;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use kvm_ops_core::guest::Script;
use kvm_ops_core::{
    Backend, Error, Exit, Field, Gfn, Host, Result, SevParams, Tech, VcpuId, VcpuOps, VmOps,
};
use kvm_ops_sev::{Failure, SevVcpu, SevVm, Status, SwapSlot, SwapStore};
use kvm_ops_sim::SimHost;
use soft_amd_sp::GuestPage;

use crate::common::{PAGE, RAM, Ram, load, measured, page, params, sp};

/// The default policy: the bit that must be 1, and SMT.
pub(crate) const POLICY: u64 = 1 << 17 | 1 << 16;

/// A guest of that many measured pages, the nth full of n, which has left once and will leave by port 0x81.
pub(crate) fn guest<H: Host>(host: &H, ram: &Ram, pages: u64) -> (SevVm<H>, SevVcpu<H>) {
    guest_of(host, ram, pages, POLICY)
}

pub(crate) fn guest_of<H: Host>(
    host: &H,
    ram: &Ram,
    pages: u64,
    policy: u64,
) -> (SevVm<H>, SevVcpu<H>) {
    let (vm, vcpu) = waiting(host, ram, policy);
    finish_guest(vm, vcpu, pages)
}

fn finish_guest<H: Host>(
    mut vm: SevVm<H>,
    mut vcpu: SevVcpu<H>,
    pages: u64,
) -> (SevVm<H>, SevVcpu<H>) {
    for n in 0..pages {
        let contents = page(n as u8);
        vm.add_initial_page(&measured(RAM + n * PAGE, &contents))
            .unwrap();
    }
    vm.vm_finalize().unwrap();
    load(
        &mut vcpu,
        Script::new().output(0x80, &[1]).output(0x81, &[2]),
    );
    assert!(matches!(
        vcpu.vcpu_run(),
        Ok(Exit::IoOut { port: 0x80, .. })
    ));
    (vm, vcpu)
}

/// An initialised VM with its slot and its vCPU.
pub(crate) fn waiting<H: Host>(host: &H, ram: &Ram, policy: u64) -> (SevVm<H>, SevVcpu<H>) {
    let sev = SevParams {
        policy: Some(policy),
        ..SevParams::default()
    };
    waiting_with(host, ram, sev)
}

fn waiting_with<H: Host>(host: &H, ram: &Ram, sev: SevParams) -> (SevVm<H>, SevVcpu<H>) {
    let params = params(1, sev);
    let mut vm = SevVm::create(host, host.next_vm_id(), Tech::SevSnp, &params).unwrap();
    vm.vm_init().unwrap();
    vm.set_memory_slot(&ram.slot(0, RAM)).unwrap();
    let vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
    (vm, vcpu)
}

/// Firmware's status behind an error.
pub(crate) fn status(error: &Error) -> Option<Status> {
    Failure::of(error)?.status()
}

/// True if the vCPU's next exit is a write to this port, after that of a kick: a guest that is stopped is kicked.
pub(crate) fn leaves_by<H: Host>(vcpu: &mut SevVcpu<H>, at: u16) -> bool {
    let exit = match vcpu.vcpu_run() {
        Ok(Exit::Interrupted) => vcpu.vcpu_run(),
        exit => exit,
    };
    matches!(exit, Ok(Exit::IoOut { port, .. }) if port == at)
}

/// The guest's pages, as it reads them itself.
pub(crate) fn contents<H: Host>(host: &SimHost, vm: &SevVm<H>, pages: u64) -> Vec<Vec<u8>> {
    let asid = vm.asid().unwrap().0;
    let page = |n| {
        let gpa = RAM + n * PAGE;
        let spa = vm.page_of(Gfn::new(gpa >> 12)).expect("in memory").base();
        let mut bytes = vec![0; 4096];
        let at = GuestPage::new(asid, gpa, spa.unwrap().get());
        sp(host).guest_read(&at, &mut bytes).unwrap();
        bytes
    };
    (0..pages).map(page).collect()
}

/// A file that goes with its descriptor.
pub(crate) struct FileStore {
    file: File,
    places: BTreeMap<SwapSlot, (u64, usize)>,
}

impl FileStore {
    pub(crate) fn new() -> Self {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("kvm-ops-sev-swap-{}-{n}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true);
        let file = file.open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        Self {
            file,
            places: BTreeMap::new(),
        }
    }

    pub(crate) fn names(&self) -> Vec<SwapSlot> {
        self.places.keys().copied().collect()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut file = &self.file;
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }
}

impl SwapStore for FileStore {
    fn put(&mut self, at: SwapSlot, page: &[u8]) -> Result<()> {
        let place = match self.places.get(&at) {
            Some((place, len)) if *len == page.len() => *place,
            _ => self.file.seek(SeekFrom::End(0)).unwrap(),
        };
        self.file.seek(SeekFrom::Start(place)).unwrap();
        self.file.write_all(page).unwrap();
        self.places.insert(at, (place, page.len()));
        Ok(())
    }

    fn get(&mut self, at: SwapSlot, page: &mut [u8]) -> Result<()> {
        let missing = Error::NotFound(Field::Page, at.index.into());
        let (place, len) = *self.places.get(&at).ok_or(missing)?;
        assert_eq!(len, page.len());
        self.file.seek(SeekFrom::Start(place)).unwrap();
        self.file.read_exact(page).unwrap();
        Ok(())
    }
}

/// A store that gives something else for one page; nothing without a lie.
pub(crate) struct Tampered<'a> {
    pub(crate) store: &'a mut FileStore,
    pub(crate) name: SwapSlot,
    pub(crate) lie: Option<Vec<u8>>,
}

impl SwapStore for Tampered<'_> {
    fn put(&mut self, at: SwapSlot, page: &[u8]) -> Result<()> {
        self.store.put(at, page)
    }

    fn get(&mut self, at: SwapSlot, page: &mut [u8]) -> Result<()> {
        match &self.lie {
            _ if at != self.name => self.store.get(at, page),
            Some(lie) => {
                page.copy_from_slice(lie);
                Ok(())
            }
            None => Err(Error::NotFound(Field::Page, at.index.into())),
        }
    }
}

/// Compares a table with the one between its marks in docs/migration.md; `BLESS=1` writes it.
pub(crate) fn compare_table(name: &str, table: &str) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/migration.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (start, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->\n"));
    let (head, rest) = text.split_once(&start).expect("the table has its place");
    let (documented, tail) = rest.split_once(&end).expect("the table has an end");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, format!("{head}{start}{table}{end}{tail}")).unwrap();
        return;
    }
    assert!(
        documented == table,
        "docs/migration.md differs; now it is:\n{table}"
    );
}
