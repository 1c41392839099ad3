//! Memory of a SEV or SEV-ES guest by the address that the caller has it at, as the kernel's commands name it.
//!
//! In the kernel it is the caller's memory whether or not a slot shows it. Here a page of the guest's stands for it from the first
//! command on.

use alloc::vec::Vec;

use kvm_ops::{Error, Field, Gfn, Host, Level, PAGE_SIZE, Pfn, Result};

use super::{Frame, Memory};
use crate::shared::Shared;
use crate::sp::Held;

/// A part of the page at a host address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// The page's address.
    pub(crate) host: u64,
    /// In bytes, from the page's start.
    pub(crate) offset: u64,
    /// In bytes. The part ends in the page.
    pub(crate) len: u64,
}

impl Part {
    /// The part of a range that lies in the range's first page.
    pub(crate) fn first(address: u64, len: u64) -> Self {
        let offset = address % PAGE_SIZE;
        Self {
            host: address - offset,
            offset,
            len: len.min(PAGE_SIZE - offset),
        }
    }

    /// A range that ends in the page where it begins.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another.
    pub(crate) fn whole(address: u64, len: u64) -> Result<Self> {
        match Self::first(address, len) {
            part if part.len == len => Ok(part),
            _ => Err(Error::Invalid(Field::Size, len)),
        }
    }
}

impl Memory {
    /// The page of 4 KiB that stands for the memory at a host address.
    ///
    /// # Errors
    /// [`Error::NotFound`] if none does.
    pub(crate) fn frame_at(&mut self, host: u64) -> Result<&mut Frame> {
        let frame = match self.gpa_of(host) {
            Some(gpa) => self.frame_mut(Gfn::containing(gpa)),
            None => self.parked.get_mut(&host),
        };
        frame.ok_or(Error::NotFound(Field::HostAddress, host))
    }
}

impl<H: Host> Shared<H> {
    /// Makes sure that a page of 4 KiB stands for the memory at a host address; a new one has these contents. Returns whether it
    /// is new.
    pub(crate) fn require_page_at(
        &self,
        memory: &mut Memory,
        host: u64,
        contents: Option<&[u8; PAGE_SIZE as usize]>,
    ) -> Result<bool> {
        let gfn = memory.gpa_of(host).map(Gfn::containing);
        if let Some(gfn) = gfn {
            if memory.is_shown(gfn) {
                self.hide(memory, gfn)?;
            }
            if memory.frame(gfn).is_some() {
                return self.split(memory, gfn).map(|()| false);
            }
        } else if memory.is_parked(host) {
            return Ok(false);
        }
        let sp = self.sp();
        let (page, held) = (sp.alloc(Level::Size4K)?, Held::Host);
        let filled = contents.map_or(Ok(()), |contents| sp.write(&page, contents));
        match (gfn, filled) {
            (Some(gfn), filled) => self
                .map_filled(memory, gfn, page, held, filled)
                .map(|()| true),
            (None, Ok(())) => {
                memory.park(host, Frame { page, held });
                Ok(true)
            }
            (None, Err(error)) => {
                sp.free(page);
                Err(error)
            }
        }
    }

    /// The same for memory that a slot shows, or a command was given before.
    ///
    /// # Errors
    /// [`Error::NoMemory`] for other memory.
    pub(crate) fn require_known_at(&self, memory: &mut Memory, host: u64) -> Result<()> {
        match memory.gpa_of(host).is_some() || memory.is_parked(host) {
            true => self.require_page_at(memory, host, None).map(drop),
            false => Err(Error::NoMemory),
        }
    }

    /// Does something with the page at a host address. One that was made for it goes if it fails.
    pub(crate) fn with_page_at<T>(
        &self,
        memory: &mut Memory,
        host: u64,
        contents: Option<&[u8; PAGE_SIZE as usize]>,
        body: impl FnOnce(&mut Memory) -> Result<T>,
    ) -> Result<T> {
        let is_new = self.require_page_at(memory, host, contents)?;
        body(memory).inspect_err(|_| {
            if !is_new {
                return;
            }
            // The first error is returned; the account lists a page that leaks.
            let page = match memory.gpa_of(host) {
                Some(gpa) => self.unmap(memory, Gfn::containing(gpa)).ok(),
                None => memory.parked.remove(&host).map(|frame| frame.page),
            };
            if let Some(page) = page {
                self.sp().free(page);
            }
        })
    }

    /// Runs a command that writes the page at a host address.
    pub(crate) fn in_place_at<T>(
        &self,
        memory: &mut Memory,
        host: u64,
        body: impl FnOnce(u64) -> Result<T>,
    ) -> Result<T> {
        let frame = memory.frame_at(host)?;
        let (held, done) = self.sp().in_place(&frame.page, body);
        frame.held = held;
        done
    }

    /// The pages at host addresses, which follow each other in memory.
    ///
    /// # Errors
    /// [`Error::Invalid`] if they do not.
    pub(crate) fn contiguous_at(&self, memory: &mut Memory, hosts: &[u64]) -> Result<Vec<Pfn>> {
        let mut pages: Vec<Pfn> = Vec::new();
        for host in hosts {
            self.require_page_at(memory, *host, None)?;
            let frame = memory.frame_at(*host)?;
            let pfn = frame.page.pfn();
            if pages
                .last()
                .is_some_and(|last| last.checked_add(1) != Some(pfn))
            {
                return Err(Error::Invalid(Field::HostAddress, *host));
            }
            pages.push(pfn);
        }
        Ok(pages)
    }

    /// Runs a command that writes the pages at host addresses.
    pub(crate) fn in_places_at<T>(
        &self,
        memory: &mut Memory,
        hosts: &[u64],
        body: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let Some((host, others)) = hosts.split_first() else {
            return body();
        };
        // Lent one within the other, so that each is taken back whatever came of those after it.
        let frame = memory.frame_at(*host)?;
        let pfn = frame.page.pfn();
        let (held, done) = self
            .sp()
            .lend(pfn, |_| self.in_places_at(memory, others, body));
        if let Ok(frame) = memory.frame_at(*host) {
            frame.held = held;
        }
        done
    }
}
