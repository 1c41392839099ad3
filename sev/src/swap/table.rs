//! Pages of records: made, taken out when the whole guest is, and brought back.

use kvm_ops::{Host, Level, Page, Result};
use zerocopy::little_endian::U64;

use super::page::{Record, Refused, SwapType, Swapping};
use super::space::{Table, table_slot};
use crate::command::{self, Command};
use crate::memory::Memory;
use crate::sp::Held;

impl<H: Host> Swapping<'_, H> {
    /// A page of free records (SNP_PAGE_MD_INIT).
    pub(super) fn new_table(&self) -> Result<Page> {
        self.sp()
            .made_by(Command::SnpPageMdInit, |page| command::SnpPageMdInit {
                paddr: U64::new(page),
            })
    }

    /// The record of a page of records. The only page of its level is the last: the context has its record.
    fn record_of(memory: &Memory, level: usize, index: usize) -> Result<Record> {
        match memory.swap.tables(level) {
            1 => Ok(Record::Root),
            _ => Ok(Record::At(memory.swap.record(level + 1, index as u32)?)),
        }
    }

    /// Takes the records out, level by level, up to the one whose record the context keeps. Goes on where it failed.
    pub(super) fn fold(&mut self, memory: &mut Memory) -> Result<()> {
        let mut level = 0;
        while memory.swap.tables(level) > 0 {
            let pages = memory.swap.tables(level);
            while pages > 1 && memory.swap.lacks_table(level + 1, pages as u32 - 1) {
                let table = self.new_table()?;
                memory.swap.push_table(level + 1, table);
            }
            for index in 0..pages {
                self.table_out(memory, level, index)?;
            }
            level += 1;
        }
        Ok(())
    }

    fn table_out(&mut self, memory: &mut Memory, level: usize, index: usize) -> Result<()> {
        if matches!(memory.swap.table(level, index), Some(Table::Away) | None) {
            return Ok(());
        }
        let record = Self::record_of(memory, level, index)?;
        let Some(page) = memory.swap.set_table(level, index, Table::Away) else {
            return Ok(());
        };
        match self.contents_out(SwapType::Metadata, &page, record, table_slot(level, index)) {
            Ok(()) => {
                // It is out, even if the RMP keeps the page, which is listed then.
                let _ = self.sp().release(page, Held::Immutable);
                Ok(())
            }
            Err(Refused::Firmware(error) | Refused::Store(error)) => {
                memory.swap.set_table(level, index, Table::Here(page));
                Err(error)
            }
            Err(Refused::Lost(error)) => {
                self.shared.poison(&error);
                let _ = self.sp().release(page, Held::Immutable);
                Err(error)
            }
        }
    }

    /// Brings the records back, the last first. Goes on where it failed.
    pub(super) fn unfold(&mut self, memory: &mut Memory) -> Result<()> {
        for level in (0..memory.swap.levels()).rev() {
            for index in 0..memory.swap.tables(level) {
                self.table_in(memory, level, index)?;
            }
            // All records above are used.
            let above = memory.swap.take_tables(level + 1);
            self.release_tables(above);
        }
        Ok(())
    }

    fn table_in(&mut self, memory: &mut Memory, level: usize, index: usize) -> Result<()> {
        if matches!(memory.swap.table(level, index), Some(Table::Here(_)) | None) {
            return Ok(());
        }
        let record = Self::record_of(memory, level, index)?;
        let page = self.sp().firmware_page(Level::Size4K)?;
        match self.contents_in(SwapType::Metadata, &page, record, table_slot(level, index)) {
            Ok(()) => {
                memory.swap.set_table(level, index, Table::Here(page));
                Ok(())
            }
            Err(error) => {
                let _ = self.sp().release(page, Held::Immutable);
                Err(error)
            }
        }
    }

    /// Gives the pages of records back once nothing is out.
    pub(super) fn free_tables(&self, memory: &mut Memory) {
        if memory.swap.has_no_leaf() {
            self.release_tables(memory.swap.clear());
        }
    }

    fn release_tables(&self, tables: impl IntoIterator<Item = Page>) {
        for table in tables {
            // The account lists a page that leaks.
            let _ = self.sp().release(table, Held::Immutable);
        }
    }
}
