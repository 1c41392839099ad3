//! State bundles: metadata lists in pages that together are one encrypted message.

use super::cipher::{Tag, Working};
use super::entries::Words;
use super::lists::PageListInfo;
use super::mbmd::{Mbmd, SIZE};
use crate::call::{Call, Leaf, invalid, shared_operand};
use crate::platform::Platform;
use crate::status::{Operand, Status};

const PAGE: usize = 4096;
/// A page of a bundle, decrypted: a metadata list.
pub(crate) type ListPage = [u8; PAGE];

/// A state bundle in the making, or on its way in.
pub(crate) struct Bundle {
    mbmd: Mbmd,
    /// The pages so far: plain in an export, encrypted in an import.
    text: Vec<u8>,
}

/// Progress of a call with a bundle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Progress {
    Complete,
    Interrupted,
}

impl Bundle {
    pub(crate) fn new(mbmd: Mbmd) -> Self {
        Bundle {
            mbmd,
            text: Vec::new(),
        }
    }

    /// Pages so far.
    pub(crate) fn pages(&self) -> u16 {
        (self.text.len() / PAGE) as u16
    }

    /// Adds the pages that `fill` makes until it returns false, and writes them, encrypted, where the list says.
    ///
    /// # Errors
    /// `OPERAND_INVALID` of R9 if the list is too short, or of a buffer. Pages made before are written.
    pub(crate) fn export_pages(
        &mut self,
        c: &Call<'_, '_>,
        key: &Working,
        list: PageList,
        mut fill: impl FnMut(&mut ListPage) -> bool,
    ) -> Leaf<Progress> {
        let first = self.text.len();
        let mut buffers = Vec::new();
        let result = loop {
            let buffer = match list.page(c.p, self.pages(), Operand::MIG_BUFF_LIST_ENTRY) {
                Ok(buffer) => buffer,
                Err(status) => break Err(status),
            };
            let mut page = [0; PAGE];
            let more = fill(&mut page);
            self.text.extend_from_slice(&page);
            buffers.push(buffer);
            if !more {
                break Ok(Progress::Complete);
            }
            if c.this.host_event_pending() {
                break Ok(Progress::Interrupted);
            }
        };
        let mut text = self.text.clone();
        self.seal(key, &mut text);
        for (page, buffer) in text[first..].chunks_exact(PAGE).zip(buffers) {
            c.p.mem.host_write(buffer, page);
        }
        result
    }

    fn seal(&self, key: &Working, text: &mut [u8]) -> Tag {
        let m = &self.mbmd;
        key.seal(m.iv_counter, m.stream, &m.aad(), text)
    }

    /// The MBMD of the complete bundle.
    pub(crate) fn sealed_mbmd(&self, key: &Working) -> [u8; SIZE] {
        let mac = self.seal(key, &mut self.text.clone());
        self.mbmd.with_mac(&mac)
    }

    /// Takes the pages of the list, and hands each to `read`, decrypted but not authenticated.
    ///
    /// # Errors
    /// A page that is not the host's. Pages before have been read.
    pub(crate) fn import_pages(
        &mut self,
        c: &Call<'_, '_>,
        key: &Working,
        list: PageList,
        mut read: impl FnMut(u16, &ListPage),
    ) -> Leaf<Progress> {
        let first = self.pages();
        let result = loop {
            let index = self.pages();
            let buffer = match list.page(c.p, index, Operand::PAGE) {
                Ok(buffer) => buffer,
                Err(_) => break Err(invalid(Operand::PAGE)),
            };
            let mut page = [0; PAGE];
            c.p.mem.host_read(buffer, &mut page);
            self.text.extend_from_slice(&page);
            if index == list.last {
                break Ok(Progress::Complete);
            }
            if c.this.host_event_pending() {
                break Ok(Progress::Interrupted);
            }
        };
        let mut text = self.text.clone();
        key.peek(self.mbmd.iv_counter, self.mbmd.stream, &mut text);
        for (index, page) in (first..).zip(text.chunks_exact(PAGE).skip(first.into())) {
            let mut bytes = [0; PAGE];
            bytes.copy_from_slice(page);
            read(index, &bytes);
        }
        result
    }

    /// Returns true if the bundle, complete, is what the exporter sent.
    pub(crate) fn is_authentic(&self, key: &Working, mac: &Tag) -> bool {
        let m = &self.mbmd;
        let mut text = self.text.clone();
        key.open(m.iv_counter, m.stream, &m.aad(), &mut text, mac)
    }
}

/// The pages of a state bundle: R9.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageList {
    pub(crate) last: u16,
    words: Words,
}

impl PageList {
    /// A list of at least `least` + 1 pages.
    pub(crate) fn parse(p: &Platform, r9: u64, least: u16) -> Leaf<Self> {
        let info = PageListInfo::parse(r9)
            .filter(|info| info.last >= least)
            .ok_or(invalid(Operand::R9))?;
        Ok(PageList {
            last: info.last,
            words: Words::page(p, info.pa, Operand::R9)?,
        })
    }

    /// The host's page at a position.
    fn page(&self, p: &Platform, index: u16, operand: Operand) -> Leaf<u64> {
        if index > self.last {
            return Err(invalid(Operand::R9));
        }
        shared_operand(p, self.words.get(p, index), PAGE as u64, operand)
    }
}

/// A failure that a list has shown; reported only once the whole bundle is known to be authentic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ListFailure {
    pub(crate) status: Status,
    /// RCX: the field concerned.
    pub(crate) field: u64,
}
