//! The pages of host memory through which the bundles of one stream pass.

use alloc::vec;
use alloc::vec::Vec;

use kvm_ops::{Error, Field, Gfn, Host, Hpa, Level, PAGE_SIZE, Page, PagePort, Result, VcpuId};
use kvm_ops_mmu::{Mutex, MutexGuard};

use super::bundle::{Bundle, MBMD_BYTES};
use super::entry::{Entry, NO_PAGE};
use crate::seamcall::{BundleAt, ListAt};
use crate::td::Td;

/// The most pages of a bundle here. The module has up to 512.
pub const BATCH: usize = 64;

const MAC: usize = 16;
const PAGE: usize = PAGE_SIZE as usize;

/// Pages for lists, in this order: MBMD, GPA list or page list, buffer list, MACs, new pages.
const LISTS: usize = 5;

/// A stream's pages. They go back when it is dropped.
pub(crate) struct Lane<'a, H: Host> {
    td: &'a Td<H>,
    stream: u16,
    lists: Vec<Page>,
    buffers: Vec<Page>,
}

impl<H: Host> Drop for Lane<'_, H> {
    fn drop(&mut self) {
        for page in self.lists.drain(..).chain(self.buffers.drain(..)) {
            self.td.give_page_back(page);
        }
    }
}

impl<'a, H: Host> Lane<'a, H> {
    pub(super) fn new(td: &'a Td<H>, stream: u16) -> Result<Self> {
        let mut lane = Self {
            td,
            stream,
            lists: Vec::new(),
            buffers: Vec::new(),
        };
        for _ in 0..LISTS {
            lane.lists.push(td.take_page(Level::Size4K)?);
        }
        for _ in 0..BATCH {
            lane.buffers.push(td.take_page(Level::Size4K)?);
        }
        Ok(lane)
    }

    fn list(&self, n: usize) -> Hpa {
        self.lists[n].hpa()
    }

    /// The page that lists the pages for an import.
    pub(super) fn new_pages(&self) -> Hpa {
        self.list(4)
    }

    /// A bundle here, of a list with `entries` entries, at least 1.
    pub(super) fn at(&self, entries: usize) -> BundleAt {
        BundleAt {
            mbmd: self.list(0),
            list: ListAt::of(self.list(1), entries),
            buffers: self.list(2),
            macs: self.list(3),
            stream: self.stream,
        }
    }

    /// Prepares the list of a state export: all buffers.
    pub(super) fn offer_buffers(&self) -> Result<BundleAt> {
        let at = self.at(BATCH);
        self.td.write_words(
            at.list.page,
            self.buffers.iter().map(|page| page.hpa().get()),
        )?;
        Ok(at)
    }

    /// Prepares the lists of an export of these frames, at most [`BATCH`].
    pub(super) fn ask_for(&self, frames: &[Gfn]) -> Result<BundleAt> {
        let at = self.at(frames.len());
        let entries = frames.iter().map(|gfn| Entry::asking_for(*gfn).0);
        self.td.write_words(at.list.page, entries)?;
        let buffers = self.buffers.iter().take(frames.len());
        self.td
            .write_words(at.buffers, buffers.map(|page| page.hpa().get()))?;
        Ok(at)
    }

    /// What the module says of the first `n` entries; nothing if they cannot be read.
    pub(super) fn outcomes(&self, n: usize) -> Vec<Entry> {
        let words = self.td.read_words(self.list(1), n).unwrap_or_default();
        words.into_iter().map(Entry).collect()
    }

    fn mbmd(&self) -> Result<[u8; MBMD_BYTES]> {
        let mut mbmd = [0; MBMD_BYTES];
        self.td.pages()?.read(self.list(0), &mut mbmd)?;
        Ok(mbmd)
    }

    fn bundle(&self, vcpu: VcpuId) -> Result<Bundle> {
        let mbmd = self.mbmd()?;
        // The module wrote it.
        let kind = Bundle::kind_of(&mbmd);
        let kind = kind.map_err(|_| Error::Invalid(Field::Bundle, mbmd[6].into()))?;
        Ok(Bundle {
            kind,
            vcpu,
            mbmd,
            entries: Vec::new(),
            macs: Vec::new(),
            pages: Vec::new(),
        })
    }

    /// The token that the module wrote.
    pub(super) fn take_token(&self) -> Result<Bundle> {
        self.bundle(VcpuId(0))
    }

    /// The state bundle that the module wrote, of `pages` pages.
    pub(super) fn take_state(&self, vcpu: VcpuId, pages: u64) -> Result<Bundle> {
        let mut bundle = self.bundle(vcpu)?;
        let pages = usize::try_from(pages).unwrap_or(usize::MAX);
        let buffers = self.buffers.get(..pages);
        let buffers = buffers.ok_or(Error::Invalid(Field::Size, pages as u64))?;
        bundle.pages = self.read_pages(&buffers.iter().collect::<Vec<_>>())?;
        Ok(bundle)
    }

    /// The memory bundle that the module wrote, of `entries` entries.
    pub(super) fn take_memory(&self, entries: usize) -> Result<Bundle> {
        let mut bundle = self.bundle(VcpuId(0))?;
        let words = self.td.read_words(self.list(1), entries)?;
        bundle.entries = words.into_iter().map(Entry).collect();
        bundle.macs = vec![0; entries * MAC];
        self.td.pages()?.read(self.list(3), &mut bundle.macs)?;
        let with_contents = bundle.entries.iter().zip(&self.buffers);
        let buffers = with_contents.filter(|(entry, _)| entry.has_contents());
        bundle.pages = self.read_pages(&buffers.map(|(_, page)| page).collect::<Vec<_>>())?;
        Ok(bundle)
    }

    fn read_pages(&self, buffers: &[&Page]) -> Result<Vec<u8>> {
        let mut pages = vec![0; buffers.len() * PAGE];
        for (buffer, page) in buffers.iter().zip(pages.chunks_exact_mut(PAGE)) {
            self.td.pages()?.read(buffer.hpa(), page)?;
        }
        Ok(pages)
    }

    /// Puts a state bundle or a token in place for an import.
    pub(super) fn put_state(&self, bundle: &Bundle) -> Result<BundleAt> {
        let (pages, _) = bundle.pages.as_chunks::<PAGE>();
        let at = self.at(pages.len());
        self.td.pages()?.write(at.mbmd, &bundle.mbmd)?;
        for (page, buffer) in pages.iter().zip(&self.buffers) {
            self.td.pages()?.write(buffer.hpa(), page)?;
        }
        let list = self.buffers.iter().take(pages.len());
        self.td
            .write_words(at.list.page, list.map(|page| page.hpa().get()))?;
        Ok(at)
    }

    /// Puts a memory bundle in place for an import; `new_pages` has an address or [`NO_PAGE`] for each
    /// entry.
    pub(super) fn put_memory(&self, bundle: &Bundle, new_pages: &[u64]) -> Result<BundleAt> {
        let at = self.at(bundle.entries.len());
        let port = self.td.pages()?;
        port.write(at.mbmd, &bundle.mbmd)?;
        self.td
            .write_words(at.list.page, bundle.entries.iter().map(|entry| entry.0))?;
        port.write(at.macs, &bundle.macs)?;
        let (pages, _) = bundle.pages.as_chunks::<PAGE>();
        let mut pages = pages.iter();
        let mut buffers = Vec::with_capacity(bundle.entries.len());
        for (entry, buffer) in bundle.entries.iter().zip(&self.buffers) {
            let contents = entry.has_contents().then(|| pages.next()).flatten();
            buffers.push(match contents {
                Some(page) => {
                    port.write(buffer.hpa(), page)?;
                    buffer.hpa().get()
                }
                None => NO_PAGE,
            });
        }
        self.td.write_words(at.buffers, buffers.into_iter())?;
        self.td
            .write_words(self.new_pages(), new_pages.iter().copied())?;
        Ok(at)
    }
}

/// The lanes of all streams, each of which one thread at a time uses.
pub(super) struct Lanes<'a, H: Host>(Vec<Mutex<Lane<'a, H>>>);

impl<'a, H: Host> Lanes<'a, H> {
    pub(super) fn new(td: &'a Td<H>, streams: u16) -> Result<Self> {
        let lanes = (0..streams).map(|stream| Lane::new(td, stream).map(Mutex::new));
        lanes.collect::<Result<_>>().map(Self)
    }

    /// The number of streams.
    pub(super) fn streams(&self) -> u16 {
        self.0.len() as u16
    }

    /// A stream's lane; `Busy` while another thread has it.
    pub(super) fn of(&self, stream: u16) -> Result<MutexGuard<'_, Lane<'a, H>>> {
        let lane = self.0.get(usize::from(stream));
        let lane = lane.ok_or(Error::Invalid(Field::Stream, stream.into()))?;
        lane.try_lock().ok_or(Error::Busy)
    }
}

/// One page for a GPA list, by which pages change their state. It goes back when it is dropped.
pub(crate) struct Scratch<'a, H: Host> {
    td: &'a Td<H>,
    page: Option<Page>,
}

impl<H: Host> Drop for Scratch<'_, H> {
    fn drop(&mut self) {
        let page = self.page.take();
        page.into_iter()
            .for_each(|page| self.td.give_page_back(page));
    }
}

impl<'a, H: Host> Scratch<'a, H> {
    pub(super) fn new(td: &'a Td<H>) -> Result<Self> {
        let page = td.take_page(Level::Size4K)?;
        let page = Some(page);
        Ok(Self { td, page })
    }

    fn at(&self) -> Result<Hpa> {
        let page = self.page.as_ref().map(Page::hpa);
        page.ok_or(Error::NoMemory)
    }

    /// A list of these frames, at most 512 of them.
    pub(super) fn list(&self, frames: &[Gfn]) -> Result<ListAt> {
        let at = self.at()?;
        let entries = frames.iter().map(|gfn| Entry::asking_for(*gfn).0);
        self.td.write_words(at, entries)?;
        Ok(ListAt::of(at, frames.len()))
    }

    /// What became of the first `n` entries.
    pub(super) fn entries(&self, n: usize) -> Result<impl Iterator<Item = Entry>> {
        let words = self.td.read_words(self.at()?, n)?;
        Ok(words.into_iter().map(Entry))
    }
}

impl<H: Host> Td<H> {
    /// Writes words to the start of a page of the host.
    fn write_words(&self, at: Hpa, words: impl Iterator<Item = u64>) -> Result<()> {
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        self.pages()?.write(at, &bytes)
    }

    /// The first `n` words of a page of the host.
    fn read_words(&self, at: Hpa, n: usize) -> Result<Vec<u64>> {
        let mut bytes = vec![0; n * 8];
        self.pages()?.read(at, &mut bytes)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }
}
