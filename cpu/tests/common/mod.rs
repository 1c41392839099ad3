//! Memory and ports for tests.
#![allow(dead_code, unreachable_pub)]

pub mod long_mode;

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use kvm_ops_cpu::{Access, Bus, Frame, Mapping};

/// Host memory that guests read and write by pointer.
pub struct Ram {
    cells: Box<[UnsafeCell<Page>]>,
}

#[repr(align(4096))]
struct Page([u8; 4096]);

// SAFETY: tests use a `Ram` from one thread at a time: that of the processor that owns the bus.
unsafe impl Sync for Ram {}
// SAFETY: as above.
unsafe impl Send for Ram {}

impl Ram {
    pub fn new(bytes: usize) -> Arc<Self> {
        let cells = (0..bytes / 4096)
            .map(|_| UnsafeCell::new(Page([0; 4096])))
            .collect();
        Arc::new(Self { cells })
    }

    pub fn frame(&self, gpa: u64) -> Option<NonNull<u8>> {
        let cell = self.cells.get((gpa >> 12) as usize)?;
        NonNull::new(cell.get().cast())
    }

    pub fn write(&self, gpa: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = gpa + done as u64;
            let offset = at as usize & 0xfff;
            let part = &data[done..data.len().min(done + 4096 - offset)];
            let frame = self.frame(at).expect("inside of memory");
            // SAFETY: the part ends with the frame, and nothing else uses the memory now.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    part.as_ptr(),
                    frame.as_ptr().add(offset),
                    part.len(),
                );
            }
            done += part.len();
        }
    }

    pub fn read(&self, gpa: u64, data: &mut [u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = gpa + done as u64;
            let offset = at as usize & 0xfff;
            let end = data.len().min(done + 4096 - offset);
            let part = &mut data[done..end];
            let frame = self.frame(at).expect("inside of memory");
            // SAFETY: as in `write`.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    frame.as_ptr().add(offset),
                    part.as_mut_ptr(),
                    part.len(),
                );
            }
            done = end;
        }
    }

    pub fn write_u64(&self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub fn read_u64(&self, gpa: u64) -> u64 {
        let mut data = [0; 8];
        self.read(gpa, &mut data);
        u64::from_le_bytes(data)
    }
}

/// A bus over a `Ram` at `base`, with a serial port that collects what is written to 0xe9.
pub struct TestBus {
    pub ram: Arc<Ram>,
    pub base: u64,
    pub output: Arc<Mutex<Vec<u8>>>,
    /// Guest-physical page that refuses everything.
    pub refused: Option<u64>,
}

impl TestBus {
    pub fn new(ram: &Arc<Ram>) -> Self {
        Self {
            ram: ram.clone(),
            base: 0,
            output: Arc::default(),
            refused: None,
        }
    }
}

impl Bus for TestBus {
    fn map(&mut self, gpa: u64, _: Access) -> Mapping {
        if self.refused == Some(gpa) {
            return Mapping::Refused { code: 0 };
        }
        match gpa.checked_sub(self.base).and_then(|at| self.ram.frame(at)) {
            // SAFETY: the bus holds the `Ram`, which never moves or frees its frames; tests touch
            // it only while the processor does not run.
            Some(host) => Mapping::Frame(unsafe { Frame::new(host, true) }),
            None => Mapping::Device,
        }
    }

    fn read(&mut self, _: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        true
    }

    fn write(&mut self, _: u64, _: &[u8]) -> bool {
        true
    }

    fn port_in(&mut self, port: u16, _: u8) -> Option<u32> {
        (port == 0xe9).then_some(0xe9)
    }

    fn port_out(&mut self, port: u16, _: u8, value: u32) -> Option<()> {
        if port != 0xe9 {
            return None;
        }
        self.output
            .lock()
            .expect("no panic while held")
            .push(value as u8);
        Some(())
    }
}
