//! A virtio console (5.3) that sends back each message, reversed. Its queues are virtio-queue's.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use kvm_ops::{Gpa, HostEvent, IoEvent, IoEventMatch, IrqEvent};
use kvm_ops_machine::{
    DeviceMemory, Devices, ExitContext, ExitHandler, Flow, Inside, MachineError,
};
use virtio_queue::{Queue, QueueT};

use crate::mmio::Mmio;

const DEVICE_ID: u32 = 3;
/// What the device sends, and what the driver sends.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// The longest message that the device keeps: the guest chooses the lengths of its buffers.
const MESSAGE_MAX: u64 = 4096;

pub(crate) struct Console {
    mmio: Mmio,
    bell: Arc<dyn HostEvent>,
    /// The messages that came.
    pub(crate) messages: Mutex<Vec<Vec<u8>>>,
    /// The devices beside it.
    others: Devices,
}

impl Console {
    pub(crate) fn new(
        machine: &dyn Inside,
        base: Gpa,
        gsi: u32,
        others: Devices,
    ) -> Result<Self, MachineError> {
        let mmio = Mmio::new(base, gsi, DEVICE_ID, 2);
        let bell = machine.io_event(IoEvent::Mmio(mmio.bell()), IoEventMatch::Any)?;
        Ok(Self {
            mmio,
            bell,
            messages: Mutex::default(),
            others,
        })
    }

    /// The life of the device's thread: it sleeps until the driver rings, and ends with the run.
    pub(crate) fn work(&self, machine: &dyn Inside) -> Result<(), MachineError> {
        let irq = machine.irq_event(self.mmio.gsi())?;
        while !machine.is_ending() {
            self.bell.wait()?;
            self.serve(machine, &*irq)?;
        }
        Ok(())
    }

    fn serve(&self, machine: &dyn Inside, irq: &dyn IrqEvent) -> Result<(), MachineError> {
        let memory = machine.memory();
        let mut registers = self.mmio.registers();
        if !registers.is_live() {
            return Ok(());
        }
        let mut used = false;
        let done = loop {
            match receive(&mut registers.queues[TRANSMIT], &memory) {
                Ok(None) => break Ok(()),
                Ok(Some(message)) => {
                    used = true;
                    let reply: Vec<u8> = message.iter().rev().copied().collect();
                    self.messages.lock().unwrap().push(message);
                    if let Err(error) = send(&mut registers.queues[RECEIVE], &memory, &reply) {
                        break Err(error);
                    }
                }
                Err(error) => break Err(error),
            }
        };
        if used {
            registers.used_buffer();
        }
        if done.is_err() {
            registers.fail();
        }
        drop(registers);
        if used || done.is_err() {
            irq.signal()?;
        }
        Ok(())
    }
}

/// Takes the next message of the driver.
fn receive(
    queue: &mut Queue,
    memory: &DeviceMemory<'_>,
) -> Result<Option<Vec<u8>>, Box<dyn std::error::Error>> {
    let Some(chain) = queue.pop_descriptor_chain(memory) else {
        return Ok(None);
    };
    let head = chain.head_index();
    let mut message = Vec::new();
    chain
        .reader(memory)?
        .take(MESSAGE_MAX)
        .read_to_end(&mut message)?;
    queue.add_used(memory, head, 0)?;
    Ok(Some(message))
}

/// Puts a message into the next buffer of the driver, if there is one.
fn send(
    queue: &mut Queue,
    memory: &DeviceMemory<'_>,
    message: &[u8],
) -> Result<(), Box<dyn std::error::Error>> {
    let Some(chain) = queue.pop_descriptor_chain(memory) else {
        return Ok(());
    };
    let head = chain.head_index();
    let written = chain.writer(memory)?.write(message)?;
    queue.add_used(memory, head, written as u32)?;
    Ok(())
}

impl ExitHandler for Console {
    fn handle(&self, exit: &mut ExitContext<'_>) -> Flow {
        match self.mmio.handle(exit) {
            true => Flow::Continue,
            false => self.others.handle(exit),
        }
    }
}
