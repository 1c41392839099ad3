//! Commands of an SEV or SEV-ES guest.

use super::super::common::*;
use super::{cell, lists};
use soft_amd_sp::crypto::{PacketContext, PacketHeader, TransportKeys};
use soft_amd_sp::{GuestState, Platform, Status};

const ES_ASID: u32 = 1;

/// A guest in a state, and what is needed to talk to it.
struct World {
    p: Platform,
    peer: Platform,
    /// The guest, and the one on the peer that it is received from.
    handle: u32,
    source: u32,
    keys: TransportKeys,
    measure: [u8; 32],
}

impl World {
    fn new(state: GuestState) -> Self {
        let (p, peer) = (sev(1), sev(2));
        let mut world = World {
            p,
            peer,
            handle: 0,
            source: 0,
            keys: TransportKeys {
                tek: [0; 16],
                tik: [0; 16],
            },
            measure: [0; 32],
        };
        match state {
            GuestState::ReceiveUpdate => world.receive(),
            _ => world.launch(state),
        }
        world
    }

    fn launch(&mut self, state: GuestState) {
        let guest_owner = owner(&self.p, SevPolicy::ES);
        self.keys = *guest_owner.keys();
        let start = owner_start(&self.p, &guest_owner, SevPolicy::ES);
        let (_, out) = run_out(&self.p, start);
        self.handle = out.handle.get();
        activate(&self.p, self.handle, ES_ASID).ok().unwrap();
        if state == GuestState::LaunchUpdate {
            return;
        }
        self.attempt(Command::LAUNCH_MEASURE).ok().unwrap();
        self.p.host_read(SCRATCH, &mut self.measure).unwrap();
        let path: &[Command] = match state {
            GuestState::LaunchSecret => &[],
            GuestState::Running => &[Command::LAUNCH_FINISH],
            GuestState::SendUpdate => &[Command::LAUNCH_FINISH, Command::SEND_START],
            _ => &[
                Command::LAUNCH_FINISH,
                Command::SEND_START,
                Command::SEND_FINISH,
            ],
        };
        for command in path {
            self.attempt(*command).ok().unwrap();
        }
    }

    fn receive(&mut self) {
        self.source = running(&self.peer, SevPolicy::ES, ES_ASID, &[0; 4096]);
        let start = send_start(&self.peer, &self.p, self.source);
        run(&self.peer, start).ok().unwrap();
        let (status, handle) = receive_start(&self.peer, &self.p, SevPolicy::ES);
        status.ok().unwrap();
        self.handle = handle;
        activate(&self.p, handle, ES_ASID).ok().unwrap();
    }

    fn state(&self) -> Option<String> {
        let guests = self.p.snapshot().guests;
        guests
            .iter()
            .find(|g| g.handle == self.handle)
            .map(|g| g.state.to_string())
    }

    fn deactivate(&self) {
        deactivate(&self.p, self.handle);
        flush(&self.p);
    }

    /// Runs the command on a guest that is active, or not, as the command needs it, and leaves the
    /// guest active unless it is refused the ASID.
    fn attempt(&self, command: Command) -> Status {
        use Command::*;
        match command {
            ACTIVATE | ACTIVATE_EX | DECOMMISSION => {
                self.deactivate();
                self.bare(command)
            }
            DEACTIVATE => {
                let status = self.bare(command);
                flush(&self.p);
                activate(&self.p, self.handle, ES_ASID);
                status
            }
            _ => self.bare(command),
        }
    }

    /// Runs the command with parameters that are valid.
    fn bare(&self, command: Command) -> Status {
        use Command::*;
        let (p, handle) = (&self.p, self.handle);
        let h = handle.into();
        let (guest, len) = (GUEST, 0x1000);
        match command {
            LAUNCH_UPDATE_DATA => update_data(p, handle, guest, len),
            LAUNCH_UPDATE_VMSA => update_vmsa(p, handle, guest, len),
            LAUNCH_MEASURE => launch_measure(p, handle, SCRATCH),
            LAUNCH_UPDATE_SECRET => {
                let mut data = [1; 0x1000];
                let context = PacketContext::LaunchSecret;
                let header =
                    PacketHeader::seal(context, &self.keys, 0, [3; 16], &mut data, &self.measure);
                p.host_write(SCRATCH, &header.to_bytes()).unwrap();
                p.host_write(SCRATCH + 0x1000, &data).unwrap();
                run(p, packet::<LaunchSecret>(handle, guest, len))
            }
            LAUNCH_FINISH => launch_finish(p, handle),
            ATTESTATION => run(p, attestation(handle)),
            SEND_START => run(p, send_start(p, &self.peer, handle)),
            SEND_UPDATE_DATA => run(p, packet::<SendUpdateData>(handle, guest, len)),
            SEND_UPDATE_VMSA => run(p, packet::<SendUpdateVmsa>(handle, guest, len)),
            SEND_FINISH => run(p, SendFinish { handle: h }),
            SEND_CANCEL => run(p, SendCancel { handle: h }),
            RECEIVE_UPDATE_DATA => {
                self.carry::<SendUpdateData>();
                run(p, packet::<ReceiveUpdateData>(handle, guest, len))
            }
            RECEIVE_UPDATE_VMSA => {
                self.carry::<SendUpdateVmsa>();
                run(p, packet::<ReceiveUpdateVmsa>(handle, guest, len))
            }
            RECEIVE_FINISH => run(p, ReceiveFinish { handle: h }),
            ACTIVATE => activate(p, handle, ES_ASID),
            ACTIVATE_EX => {
                let activate = ActivateEx {
                    handle: h,
                    asid: ES_ASID.into(),
                    ..Default::default()
                };
                run(p, activate)
            }
            DEACTIVATE => deactivate(p, handle),
            DECOMMISSION => decommission(p, handle),
            GUEST_STATUS => {
                let status = GuestStatus {
                    handle: h,
                    ..Default::default()
                };
                run(p, status)
            }
            DBG_DECRYPT => {
                let decrypt = DbgDecrypt {
                    handle: h,
                    src_paddr: guest.into(),
                    dst_paddr: (guest + 0x2000).into(),
                    length: 16.into(),
                    ..Default::default()
                };
                run(p, decrypt)
            }
            DBG_ENCRYPT => {
                let encrypt = DbgEncrypt {
                    handle: h,
                    src_paddr: guest.into(),
                    dst_paddr: (guest + 0x2000).into(),
                    length: 16.into(),
                    ..Default::default()
                };
                run(p, encrypt)
            }
            COPY => {
                let copy = CopyMemory {
                    handle: h,
                    length: 16.into(),
                    src_paddr: guest.into(),
                    dst_paddr: (guest + 0x2000).into(),
                };
                run(p, copy)
            }
            other => unreachable!("{other} is not a command of a guest"),
        }
    }

    /// Carries a packet over from the guest that is received, if there is one.
    fn carry<C: Packet>(&self) {
        if self.source != 0 {
            let send: C = packet(self.source, GUEST, 0x1000);
            run(&self.peer, send).ok().unwrap();
            let mut bytes = vec![0; 0x2000];
            self.peer.host_read(SCRATCH, &mut bytes).unwrap();
            self.p.host_write(SCRATCH, &bytes).unwrap();
        }
    }
}

/// Tries commands in a state; a new guest is made whenever one left the state.
pub(super) fn column(state: GuestState) -> Vec<String> {
    let mut world = World::new(state);
    let mut column = Vec::new();
    for command in lists::GUEST {
        let before = world.state();
        assert_eq!(before, Some(state.to_string()));
        let status = world.attempt(*command);
        let after = world.state();
        let activating = matches!(command, Command::ACTIVATE | Command::ACTIVATE_EX);
        if after != before || activating {
            // A refused activation leaves the guest without the ASID it had.
            world = World::new(state);
        }
        column.push(cell(status, before, after));
    }
    column
}

/// A state that allows the command.
fn home(command: Command) -> GuestState {
    use Command::*;
    match command {
        LAUNCH_UPDATE_SECRET | LAUNCH_FINISH => GuestState::LaunchSecret,
        ATTESTATION | SEND_START => GuestState::Running,
        SEND_UPDATE_DATA | SEND_UPDATE_VMSA | SEND_FINISH | SEND_CANCEL => GuestState::SendUpdate,
        RECEIVE_UPDATE_DATA | RECEIVE_UPDATE_VMSA | RECEIVE_FINISH => GuestState::ReceiveUpdate,
        _ => GuestState::LaunchUpdate,
    }
}

/// Tries the command on a guest that is active, is not, is not there, and on platforms without any.
pub(super) fn presence(command: Command) -> Vec<String> {
    let world = |change: fn(&mut World)| {
        let mut world = World::new(home(command));
        change(&mut world);
        let before = world.state();
        let status = world.bare(command);
        cell(status, before, world.state())
    };
    vec![
        world(|_| ()),
        world(|w| w.deactivate()),
        world(|w| w.handle += 1),
        world(|w| w.p = sev(1)),
        world(|w| w.p = builder(1).build().unwrap()),
    ]
}
