//! Physical memory: sparse, shared by all processors, private lines encrypted and integrity-protected.
//!
//! As memory encryption does in hardware, protection works on 64-byte lines. A line carries the bit that says
//! it belongs to a TD (here: the generation of its key) and a 28-bit MAC over ciphertext and address. Host
//! accesses go without key: they see ciphertext and turn a written line into an ordinary one, which the TD's
//! next read detects. A read with another private key fails the MAC.
//!
//! Pages that a processor uses directly are open: they are kept in plaintext, and each view of them is made when it
//! is asked for.

mod crypt;
mod open;
mod turn;

pub(crate) use crypt::{KeyRing, LineKey};
pub use open::GuestFrame;
pub(crate) use open::OpenPage;
pub use turn::GuestTurn;
pub(crate) use turn::Turns;

use crate::arena::lock;
use std::sync::{Arc, Mutex, OnceLock};

const PAGE: usize = 4096;
const LINE: usize = 64;
const LINES: usize = PAGE / LINE;
const CHUNK_PAGES: usize = 512;

/// A line's protection: generation of the key it was written under (0: not private) and MAC.
#[derive(Clone, Copy, Default)]
struct Line {
    generation: u32,
    mac: u32,
}

struct Page {
    bytes: [u8; PAGE],
    /// Absent while every line is ordinary.
    lines: Option<Box<[Line; LINES]>>,
}

/// A page with bytes.
enum Held {
    Stored(Box<Page>),
    Open(Arc<OpenPage>),
}

/// 2 MiB of memory. Pages never written, and pages zeroed whole, have no bytes: `zeroed_under` is the key
/// generation their zeros are encrypted with.
#[derive(Default)]
struct Chunk {
    pages: Option<Box<[Option<Held>]>>,
    zeroed_under: Option<Box<[u32; CHUNK_PAGES]>>,
}

/// The private read met a line that was not written with its key: the processor would take a machine check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct IntegrityFailure;

/// Errors of a host access to physical memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum MemoryError {
    /// Beyond the end of RAM.
    OutOfRange {
        /// First address of the access, without key id.
        pa: u64,
    },
    /// The key-id bits name a private key id; outside SEAM mode such an access faults.
    PrivateKeyId {
        /// The key id.
        keyid: u64,
    },
}

impl core::fmt::Display for MemoryError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            MemoryError::OutOfRange { pa } => write!(f, "no memory at {pa:#x}"),
            MemoryError::PrivateKeyId { keyid } => {
                write!(
                    f,
                    "key id {keyid:#x} is private, the host cannot access memory with it"
                )
            }
        }
    }
}

impl std::error::Error for MemoryError {}

pub(crate) struct PhysicalMemory {
    bytes: u64,
    gigs: Box<[Gig]>,
    pub(crate) keys: KeyRing,
}

/// A GiB in 512 chunks, absent while untouched.
type Gig = OnceLock<Box<[Mutex<Chunk>]>>;

/// View of private lines that an access has.
#[derive(Clone, Copy)]
enum View<'a> {
    /// Without key: ciphertext.
    Host,
    /// With a private key.
    Private(&'a LineKey),
    /// With the key of the line's writer; for observation.
    Plain,
}

impl PhysicalMemory {
    pub(crate) fn new(bytes: u64, keys: KeyRing) -> Self {
        PhysicalMemory {
            bytes,
            gigs: (0..bytes.div_ceil(1 << 30))
                .map(|_| OnceLock::new())
                .collect(),
            keys,
        }
    }

    pub(crate) fn contains(&self, pa: u64, len: u64) -> bool {
        pa.checked_add(len).is_some_and(|end| end <= self.bytes)
    }

    /// Reads as the host does. Absent memory reads as zeros, as the module's own accesses need an answer.
    pub(crate) fn host_read(&self, pa: u64, buf: &mut [u8]) {
        let _ = self.read(pa, buf, View::Host);
    }

    pub(crate) fn host_read_u64(&self, pa: u64) -> u64 {
        let mut b = [0; 8];
        self.host_read(pa, &mut b);
        u64::from_le_bytes(b)
    }

    /// Writes as the host does. Writes to absent memory are dropped.
    pub(crate) fn host_write(&self, pa: u64, data: &[u8]) {
        let _ = self.write(pa, data, None);
    }

    /// Changes bytes of one page as the host does, in one access; returns the old bytes. A range that crosses a
    /// page is not changed.
    pub(crate) fn host_update<const N: usize>(
        &self,
        pa: u64,
        change: impl FnOnce([u8; N]) -> [u8; N],
    ) -> [u8; N] {
        let mut old = [0; N];
        self.with_chunk(pa, true, |chunk, index| {
            let fits = pa as usize % PAGE + N <= PAGE;
            let Some(chunk) = chunk.filter(|_| fits) else {
                return;
            };
            // Accesses without key do not fail.
            let _ = read_page(chunk, index, pa, &mut old, View::Host, &self.keys);
            let new = change(old);
            let _ = write_page(chunk, index, pa, &new, None, &self.keys);
        });
        old
    }

    /// Reads with a TD's key (`None`: encryption is off).
    pub(crate) fn private_read(
        &self,
        pa: u64,
        buf: &mut [u8],
        key: Option<&LineKey>,
    ) -> Result<(), IntegrityFailure> {
        self.read(pa, buf, key.map_or(View::Host, View::Private))
    }

    /// Writes with a TD's key. A write of part of a line reads the rest first, and so can fail.
    pub(crate) fn private_write(
        &self,
        pa: u64,
        data: &[u8],
        key: Option<&LineKey>,
    ) -> Result<(), IntegrityFailure> {
        self.write(pa, data, key)
    }

    /// Reads each line as its last writer sees it.
    pub(crate) fn peek(&self, pa: u64, buf: &mut [u8]) {
        let _ = self.read(pa, buf, View::Plain);
    }

    /// Makes whole pages zero under a key, without touching their bytes.
    pub(crate) fn zero_pages(&self, pa: u64, pages: u64, key: Option<&LineKey>) {
        let generation = key.map_or(0, LineKey::generation);
        for page in 0..pages {
            self.with_chunk(pa + page * PAGE as u64, true, |chunk, index| {
                let Some(chunk) = chunk else { return };
                if let Some(pages) = &mut chunk.pages
                    && let Some(Held::Open(open)) = pages[index].take()
                {
                    open.turns().note_closed();
                }
                if generation != 0 || chunk.zeroed_under.is_some() {
                    chunk
                        .zeroed_under
                        .get_or_insert_with(|| Box::new([0; CHUNK_PAGES]))[index] = generation;
                }
            });
        }
    }

    /// Opens a page for the processors of the TD with that key (`None`: encryption is off). They ask in a turn
    /// or not, since no byte of an open page is touched.
    ///
    /// # Errors
    /// A line of the page was not written with the key.
    pub(crate) fn open(
        &self,
        pa: u64,
        key: Option<&Arc<LineKey>>,
    ) -> Result<Arc<OpenPage>, IntegrityFailure> {
        let pa = pa & !(PAGE as u64 - 1);
        let index = (pa >> 12) as usize % CHUNK_PAGES;
        let chunks = self.chunks(pa, true).ok_or(IntegrityFailure)?;
        let chunk = &mut *lock(&chunks[(pa >> 21) as usize % CHUNK_PAGES]);
        let zeros_under = chunk.zeroed_under.as_ref().map_or(0, |z| z[index]);
        let pages = chunk.pages.get_or_insert_with(no_pages);
        let turns = self.keys.turns(key);
        let open = match &pages[index] {
            Some(Held::Open(open)) if Arc::ptr_eq(open.turns(), turns) => return Ok(open.clone()),
            // Another TD's.
            Some(Held::Open(_)) => return Err(IntegrityFailure),
            Some(Held::Stored(page)) => OpenPage::of(page, pa, key, turns)?,
            None if zeros_under != key.map_or(0, |key| key.generation()) => {
                return Err(IntegrityFailure);
            }
            None => OpenPage::zeros(key, turns),
        };
        let open = Arc::new(open);
        pages[index] = Some(Held::Open(open.clone()));
        Ok(open)
    }

    /// The chunks of the GiB that `pa` is in. Without `create`, `None` for one never touched.
    fn chunks(&self, pa: u64, create: bool) -> Option<&[Mutex<Chunk>]> {
        let gig = usize::try_from(pa >> 30).ok()?;
        let gig = self.gigs.get(gig).filter(|_| pa < self.bytes)?;
        let fresh = || (0..CHUNK_PAGES).map(|_| Mutex::default()).collect();
        match create {
            true => Some(gig.get_or_init(fresh)),
            false => gig.get().map(|chunks| &**chunks),
        }
    }

    /// Runs `f` on the chunk and page index of `pa`, in a turn of the page's TD if it is open. Without `create`,
    /// a region never touched is `None`; so is memory that does not exist.
    fn with_chunk<R>(
        &self,
        pa: u64,
        create: bool,
        f: impl FnOnce(Option<&mut Chunk>, usize) -> R,
    ) -> R {
        let index = (pa >> 12) as usize % CHUNK_PAGES;
        let Some(chunks) = self.chunks(pa, create) else {
            return f(None, index);
        };
        let chunk = &chunks[(pa >> 21) as usize % CHUNK_PAGES];
        let mut locked = lock(chunk);
        // Turns come before chunks: with the chunk locked no turn is waited for.
        let mut turn: Option<GuestTurn> = None;
        while let Some(turns) = locked.turns(index) {
            if turn.as_ref().is_some_and(|turn| turn.is_at(&turns)) {
                break;
            }
            turn = turns.try_take();
            if turn.is_none() {
                drop(locked);
                turn = Some(turns.take());
                locked = lock(chunk);
            }
        }
        let result = f(Some(&mut locked), index);
        drop(locked);
        result
    }

    fn read(&self, pa: u64, buf: &mut [u8], view: View<'_>) -> Result<(), IntegrityFailure> {
        for (pa, part) in parts_mut(pa, buf, PAGE) {
            self.with_chunk(pa, false, |chunk, index| {
                let empty = Chunk::default();
                read_page(
                    chunk.as_deref().unwrap_or(&empty),
                    index,
                    pa,
                    part,
                    view,
                    &self.keys,
                )
            })?;
        }
        Ok(())
    }

    fn write(&self, pa: u64, data: &[u8], key: Option<&LineKey>) -> Result<(), IntegrityFailure> {
        let mut offset = 0;
        while offset < data.len() {
            let at = pa.wrapping_add(offset as u64);
            let len = (PAGE - (at as usize & (PAGE - 1))).min(data.len() - offset);
            let part = &data[offset..offset + len];
            self.with_chunk(at, true, |chunk, index| match chunk {
                Some(chunk) => write_page(chunk, index, at, part, key, &self.keys),
                None => Ok(()),
            })?;
            offset += len;
        }
        Ok(())
    }
}

/// Cuts a buffer at multiples of `unit` of its address.
fn parts_mut(pa: u64, mut buf: &mut [u8], unit: usize) -> impl Iterator<Item = (u64, &mut [u8])> {
    let mut at = pa;
    std::iter::from_fn(move || {
        if buf.is_empty() {
            return None;
        }
        let len = (unit - (at as usize & (unit - 1))).min(buf.len());
        let (head, tail) = std::mem::take(&mut buf).split_at_mut(len);
        buf = tail;
        let here = at;
        at = at.wrapping_add(len as u64);
        Some((here, head))
    })
}

fn no_pages() -> Box<[Option<Held>]> {
    (0..CHUNK_PAGES).map(|_| None).collect()
}

impl Chunk {
    /// The turns at a page, if it is open.
    fn turns(&self, index: usize) -> Option<Arc<Turns>> {
        match self.pages.as_ref()?[index].as_ref()? {
            Held::Open(open) => Some(open.turns().clone()),
            Held::Stored(_) => None,
        }
    }
}

fn read_page(
    chunk: &Chunk,
    index: usize,
    pa: u64,
    buf: &mut [u8],
    view: View<'_>,
    keys: &KeyRing,
) -> Result<(), IntegrityFailure> {
    let held = chunk.pages.as_ref().and_then(|p| p[index].as_ref());
    if let Some(Held::Open(open)) = held {
        return open.view(pa, buf, view, |generation| {
            keys.of_generation(generation).is_some()
        });
    }
    let Some(Held::Stored(page)) = held else {
        let generation = chunk.zeroed_under.as_ref().map_or(0, |z| z[index]);
        return match view {
            View::Private(key) if key.generation() != generation => Err(IntegrityFailure),
            View::Host if generation != 0 => {
                for (pa, part) in parts_mut(pa, buf, LINE) {
                    let line = keys.encrypted_zeros(generation, pa & !(LINE as u64 - 1));
                    let from = pa as usize % LINE;
                    part.copy_from_slice(&line[from..from + part.len()]);
                }
                Ok(())
            }
            _ => {
                buf.fill(0);
                Ok(())
            }
        };
    };
    let Some(lines) = &page.lines else {
        if matches!(view, View::Private(_)) {
            return Err(IntegrityFailure);
        }
        let from = pa as usize % PAGE;
        buf.copy_from_slice(&page.bytes[from..from + buf.len()]);
        return Ok(());
    };
    for (pa, part) in parts_mut(pa, buf, LINE) {
        let offset = pa as usize % PAGE;
        let line = lines[offset / LINE];
        let owned;
        let key = match view {
            View::Host => None,
            View::Private(key) => {
                if line.generation == 0 {
                    return Err(IntegrityFailure);
                }
                Some(key)
            }
            View::Plain => {
                owned = keys.of_generation(line.generation);
                owned.as_deref()
            }
        };
        let start = offset / LINE * LINE;
        let mut bytes = [0; LINE];
        bytes.copy_from_slice(&page.bytes[start..start + LINE]);
        if let Some(key) = key {
            let line_pa = pa & !(LINE as u64 - 1);
            if key.mac(line_pa, &bytes) == line.mac {
                key.decrypt(line_pa, &mut bytes);
            } else if matches!(view, View::Private(_)) {
                return Err(IntegrityFailure);
            }
        }
        part.copy_from_slice(&bytes[offset - start..offset - start + part.len()]);
    }
    Ok(())
}

fn write_page(
    chunk: &mut Chunk,
    index: usize,
    pa: u64,
    data: &[u8],
    key: Option<&LineKey>,
    keys: &KeyRing,
) -> Result<(), IntegrityFailure> {
    let zeros_under = chunk.zeroed_under.as_ref().map_or(0, |z| z[index]);
    let page_pa = pa & !(PAGE as u64 - 1);
    let held = &mut chunk.pages.get_or_insert_with(no_pages)[index];
    if let Some(Held::Open(open)) = held {
        if open.is_of(key) {
            open.write(pa as usize % PAGE, data);
            return Ok(());
        }
        *held = Some(Held::Stored(open.close(page_pa)));
    }
    let fresh = || {
        let mut page = Box::new(Page {
            bytes: [0; PAGE],
            lines: None,
        });
        if zeros_under != 0 {
            page.materialise_zeros(page_pa, zeros_under, keys);
        }
        Held::Stored(page)
    };
    let Held::Stored(page) = held.get_or_insert_with(fresh) else {
        // It was closed above.
        return Err(IntegrityFailure);
    };
    let Some(key) = key else {
        let from = pa as usize % PAGE;
        page.bytes[from..from + data.len()].copy_from_slice(data);
        if let Some(lines) = &mut page.lines {
            for line in &mut lines[from / LINE..=(from + data.len() - 1) / LINE] {
                *line = Line::default();
            }
        }
        return Ok(());
    };
    let mut done = 0;
    while done < data.len() {
        let at = pa + done as u64;
        let offset = at as usize % PAGE;
        let within = offset % LINE;
        let len = (LINE - within).min(data.len() - done);
        page.write_line(at - within as u64, within, &data[done..done + len], key)?;
        done += len;
    }
    Ok(())
}

impl Page {
    fn materialise_zeros(&mut self, pa: u64, generation: u32, keys: &KeyRing) {
        let lines = self.lines.insert(Box::new([Line::default(); LINES]));
        for (i, line) in lines.iter_mut().enumerate() {
            let line_pa = pa + (i * LINE) as u64;
            let bytes = keys.encrypted_zeros(generation, line_pa);
            // Under a dead key no MAC can be made, and none will ever be checked.
            let mac = keys
                .of_generation(generation)
                .map_or(0, |k| k.mac(line_pa, &bytes));
            *line = Line { generation, mac };
            self.bytes[i * LINE..(i + 1) * LINE].copy_from_slice(&bytes);
        }
    }

    fn write_line(
        &mut self,
        line_pa: u64,
        within: usize,
        data: &[u8],
        key: &LineKey,
    ) -> Result<(), IntegrityFailure> {
        let start = line_pa as usize % PAGE;
        let lines = self
            .lines
            .get_or_insert_with(|| Box::new([Line::default(); LINES]));
        let line = &mut lines[start / LINE];
        let mut bytes = [0; LINE];
        if data.len() < LINE {
            bytes.copy_from_slice(&self.bytes[start..start + LINE]);
            if line.generation == 0 || key.mac(line_pa, &bytes) != line.mac {
                return Err(IntegrityFailure);
            }
            key.decrypt(line_pa, &mut bytes);
        }
        bytes[within..within + data.len()].copy_from_slice(data);
        key.encrypt(line_pa, &mut bytes);
        *line = Line {
            generation: key.generation(),
            mac: key.mac(line_pa, &bytes),
        };
        self.bytes[start..start + LINE].copy_from_slice(&bytes);
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
