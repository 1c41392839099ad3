//! Tries every command in every state.

use super::common::*;
use soft_amd_sp::crypto::{PacketContext, PacketHeader, TransportKeys};
use soft_amd_sp::{
    Command, CommandBuffer, GuestState, Platform, PlatformState, RmpUpdate, SnpState, Status,
    policy, snp_policy,
};
use std::fmt::Write;

const ES_ASID: u32 = 1;
const GCTX: u64 = 0x1000;
const PAGE: u64 = 0x50_0000;

/// Commands of the platform, tried in each of its states.
pub const PLATFORM: &[Command] = {
    use Command::*;
    &[
        INIT,
        INIT_EX,
        SHUTDOWN,
        FACTORY_RESET,
        PLATFORM_STATUS,
        PEK_GEN,
        PEK_CSR,
        PEK_CERT_IMPORT,
        PDH_CERT_EXPORT,
        PDH_GEN,
        DF_FLUSH,
        GET_ID,
        NOP,
        LAUNCH_START,
        RECEIVE_START,
        GUEST_STATUS,
        DECOMMISSION,
    ]
};

/// Commands of an SEV or SEV-ES guest.
pub const GUEST_COMMANDS: &[Command] = {
    use Command::*;
    &[
        LAUNCH_UPDATE_DATA,
        LAUNCH_UPDATE_VMSA,
        LAUNCH_MEASURE,
        LAUNCH_UPDATE_SECRET,
        LAUNCH_FINISH,
        ATTESTATION,
        SEND_START,
        SEND_UPDATE_DATA,
        SEND_UPDATE_VMSA,
        SEND_FINISH,
        SEND_CANCEL,
        RECEIVE_UPDATE_DATA,
        RECEIVE_UPDATE_VMSA,
        RECEIVE_FINISH,
        ACTIVATE,
        ACTIVATE_EX,
        DEACTIVATE,
        GUEST_STATUS,
        DECOMMISSION,
        DBG_DECRYPT,
        DBG_ENCRYPT,
        COPY,
    ]
};

/// Commands of the SNP platform.
pub const SNP_PLATFORM: &[Command] = {
    use Command::*;
    &[
        SNP_INIT,
        SNP_INIT_EX,
        SNP_SHUTDOWN,
        SNP_SHUTDOWN_EX,
        SNP_PLATFORM_STATUS,
        SNP_FEATURE_INFO,
        SNP_DF_FLUSH,
        SNP_PAGE_RECLAIM,
        SNP_PAGE_UNSMASH,
        SNP_PAGE_SET_STATE,
        SNP_CONFIG,
        SNP_COMMIT,
        SNP_GCTX_CREATE,
    ]
};

/// Commands of an SNP guest.
pub const SNP_COMMANDS: &[Command] = {
    use Command::*;
    &[
        SNP_LAUNCH_START,
        SNP_ACTIVATE,
        SNP_ACTIVATE_EX,
        SNP_LAUNCH_UPDATE,
        SNP_LAUNCH_FINISH,
        SNP_GUEST_REQUEST,
        SNP_PAGE_MOVE,
        SNP_DBG_DECRYPT,
        SNP_DBG_ENCRYPT,
        SNP_GUEST_STATUS,
        SNP_DECOMMISSION,
    ]
};

/// What a command did: `=` nothing to the state, `->X` led to X, `free` ended the guest, or the
/// number of its status.
fn cell(status: Status, before: Option<String>, after: Option<String>) -> String {
    match (status, after) {
        (Status::SUCCESS, None) if before.is_some() => "free".to_owned(),
        (Status::SUCCESS, after) if after == before => "=".to_owned(),
        (Status::SUCCESS, Some(after)) => format!("->{after}"),
        (status, after) => {
            assert_eq!(before, after, "{status} changed the state");
            format!("{:#04x}", status.0)
        }
    }
}

// --- The platform for SEV and SEV-ES ---

const PLATFORM_STATES: [PlatformState; 3] = [
    PlatformState::Uninit,
    PlatformState::Init,
    PlatformState::Working,
];

fn platform_in(state: PlatformState) -> (Platform, u32) {
    let p = builder(1).build().unwrap();
    let mut handle = 1;
    if state != PlatformState::Uninit {
        init(&p).ok().unwrap();
        flush(&p);
    }
    if state == PlatformState::Working {
        let (_, out) = run_out(&p, Command::LAUNCH_START, &[]);
        handle = out.get("handle").unwrap() as u32;
    }
    (p, handle)
}

fn platform_cell(command: Command, state: PlatformState, peer: &Platform) -> String {
    let (p, handle) = platform_in(state);
    let before = p.snapshot().platform.to_string();
    let status = platform_attempt(&p, peer, command, handle);
    cell(
        status,
        Some(before),
        Some(p.snapshot().platform.to_string()),
    )
}

fn platform_attempt(p: &Platform, peer: &Platform, command: Command, handle: u32) -> Status {
    let len = soft_amd_sp::crypto::CERT_LEN as u64;
    match command {
        Command::INIT => init(p),
        Command::INIT_EX => run(p, command, &[("length", 0x24)]),
        Command::PEK_CSR => run(p, command, &[("address", SCRATCH), ("len", len)]),
        Command::GET_ID => run(p, command, &[("address", SCRATCH), ("len", 64)]),
        Command::PDH_CERT_EXPORT => {
            let fields = [
                ("pdh_cert_address", SCRATCH),
                ("pdh_cert_len", len),
                ("cert_chain_address", SCRATCH + 0x1000),
                ("cert_chain_len", 3 * len),
            ];
            run(p, command, &fields)
        }
        Command::PEK_CERT_IMPORT => {
            // The certificates that the platform made for itself are good enough to import.
            platform_attempt(p, peer, Command::PDH_CERT_EXPORT, handle);
            let fields = [
                ("pek_cert_address", SCRATCH + 0x1000),
                ("pek_cert_len", len),
                ("oca_cert_address", SCRATCH + 0x1000 + len),
                ("oca_cert_len", len),
            ];
            run(p, command, &fields)
        }
        Command::RECEIVE_START => {
            let source = running(peer, 0, 6, &[0; 16]);
            let p_initialised = p.snapshot().platform != PlatformState::Uninit;
            if p_initialised {
                let fields = send_fields(peer, p, source);
                run(peer, Command::SEND_START, &fields).ok().unwrap();
            }
            let status = receive_start(peer, p, 0).0;
            on(peer, Command::DEACTIVATE, source).ok().unwrap();
            on(peer, Command::DECOMMISSION, source).ok().unwrap();
            flush(peer);
            status
        }
        Command::GUEST_STATUS | Command::DECOMMISSION => on(p, command, handle),
        Command::DF_FLUSH => {
            p.wbinvd_all();
            run(p, command, &[])
        }
        _ => run(p, command, &[]),
    }
}

// --- A guest of SEV and SEV-ES ---

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
        let guest_owner = owner(&self.p, policy::ES);
        self.keys = *guest_owner.keys();
        let fields = owner_fields(&self.p, &guest_owner, policy::ES);
        let (_, out) = run_out(&self.p, Command::LAUNCH_START, &fields);
        self.handle = out.get("handle").unwrap() as u32;
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
        self.source = running(&self.peer, policy::ES, ES_ASID, &[0; 4096]);
        let fields = send_fields(&self.peer, &self.p, self.source);
        run(&self.peer, Command::SEND_START, &fields).ok().unwrap();
        let (status, handle) = receive_start(&self.peer, &self.p, policy::ES);
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

    /// Runs the command so that it works wherever the state allows it.
    fn attempt(&self, command: Command) -> Status {
        use Command::*;
        let p = &self.p;
        let h = ("handle", u64::from(self.handle));
        let packet = packet_fields(self.handle, GUEST, 0x1000);
        match command {
            LAUNCH_UPDATE_DATA | LAUNCH_UPDATE_VMSA => {
                run(p, command, &[h, ("address", GUEST), ("len", 0x1000)])
            }
            LAUNCH_MEASURE => run(p, command, &[h, ("address", SCRATCH), ("len", 48)]),
            LAUNCH_UPDATE_SECRET => {
                let mut data = [1; 0x1000];
                let context = PacketContext::LaunchSecret;
                let header =
                    PacketHeader::seal(context, &self.keys, 0, [3; 16], &mut data, &self.measure);
                p.host_write(SCRATCH, &header.to_bytes()).unwrap();
                p.host_write(SCRATCH + 0x1000, &data).unwrap();
                run(p, command, &packet)
            }
            ATTESTATION => run(p, command, &[h, ("address", SCRATCH), ("len", 0xd0)]),
            SEND_START => run(p, command, &send_fields(p, &self.peer, self.handle)),
            SEND_UPDATE_DATA | SEND_UPDATE_VMSA => run(p, command, &packet),
            RECEIVE_UPDATE_DATA | RECEIVE_UPDATE_VMSA => {
                if self.source != 0 {
                    let send = match command {
                        RECEIVE_UPDATE_DATA => SEND_UPDATE_DATA,
                        _ => SEND_UPDATE_VMSA,
                    };
                    let fields = packet_fields(self.source, GUEST, 0x1000);
                    run(&self.peer, send, &fields).ok().unwrap();
                    let mut bytes = vec![0; 0x2000];
                    self.peer.host_read(SCRATCH, &mut bytes).unwrap();
                    p.host_write(SCRATCH, &bytes).unwrap();
                }
                run(p, command, &packet)
            }
            ACTIVATE | ACTIVATE_EX | DECOMMISSION => {
                on(p, DEACTIVATE, self.handle);
                flush(p);
                let fields: &[_] = match command {
                    DECOMMISSION => &[h],
                    ACTIVATE => &[h, ("asid", ES_ASID.into())],
                    _ => &[h, ("asid", ES_ASID.into()), ("ex_len", 0x18)],
                };
                run(p, command, fields)
            }
            DEACTIVATE => {
                let status = run(p, command, &[h]);
                flush(p);
                activate(p, self.handle, ES_ASID);
                status
            }
            DBG_DECRYPT | DBG_ENCRYPT => {
                let fields = [h, ("src", GUEST), ("dst", GUEST + 0x2000), ("len", 16)];
                run(p, command, &fields)
            }
            COPY => {
                let fields = [h, ("length", 16), ("src", GUEST), ("dst", GUEST + 0x2000)];
                run(p, command, &fields)
            }
            _ => run(p, command, &[h]),
        }
    }
}

/// Tries commands in a state; a new guest is made whenever one left the state.
fn guest_column(state: GuestState) -> Vec<String> {
    let mut world = World::new(state);
    let mut column = Vec::new();
    for command in GUEST_COMMANDS {
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

// --- SNP ---

fn snp_platform_cell(command: Command, initialised: bool) -> String {
    let p = if initialised {
        snp(1)
    } else {
        let p = builder(1).build().unwrap();
        p.enable_snp_all();
        p
    };
    let name = |p: &Platform| Some(if p.snapshot().snp { "INIT" } else { "UNINIT" }.to_owned());
    let before = name(&p);
    let large = 0x80_0000;
    p.host_write(SCRATCH, &[0; 8]).unwrap();
    p.rmpupdate(PAGE, &RmpUpdate::firmware()).unwrap();
    let fields: &[_] = match command {
        Command::SNP_INIT_EX => &[("flags", 1)],
        Command::SNP_SHUTDOWN_EX => &[("len", 8)],
        Command::SNP_PLATFORM_STATUS => &[("status_paddr", PAGE)],
        Command::SNP_FEATURE_INFO => &[("length", 16), ("feature_info_paddr", PAGE)],
        Command::SNP_PAGE_RECLAIM => &[("paddr", PAGE)],
        Command::SNP_PAGE_UNSMASH => {
            for i in 0..512 {
                let at = large + i * 0x1000;
                p.rmpupdate(at, &RmpUpdate::pre_guest(1, at)).unwrap();
            }
            &[("paddr", large)]
        }
        Command::SNP_PAGE_SET_STATE => &[("length", 16), ("list_paddr", SCRATCH)],
        Command::SNP_COMMIT => &[("length", 4)],
        Command::SNP_GCTX_CREATE => &[("gctx_paddr", PAGE)],
        _ => &[],
    };
    if command == Command::SNP_DF_FLUSH {
        p.wbinvd_all();
    }
    let status = run(&p, command, fields);
    cell(status, before, name(&p))
}

/// An SNP guest in a state, active where that is possible.
fn snp_guest_in(state: SnpState, active: bool) -> Platform {
    let p = snp(1);
    p.rmpupdate(GCTX, &RmpUpdate::firmware()).unwrap();
    let on = |command, fields: &[(&'static str, u64)]| {
        let mut all = vec![("gctx_paddr", GCTX)];
        all.extend_from_slice(fields);
        run(&p, command, &all).ok().unwrap();
    };
    on(Command::SNP_GCTX_CREATE, &[]);
    if state == SnpState::Init {
        return p;
    }
    on(
        Command::SNP_LAUNCH_START,
        &[("policy", 0x3_0000 | snp_policy::DEBUG)],
    );
    if active {
        on(Command::SNP_ACTIVATE, &[("asid", 1)]);
        snp_add(&p, GCTX, 1, PAGE, 0x8000, 5).ok().unwrap();
    }
    if state == SnpState::Running {
        on(Command::SNP_LAUNCH_FINISH, &[]);
    }
    p
}

fn snp_guest_cell(command: Command, state: SnpState) -> String {
    let activating = matches!(command, Command::SNP_ACTIVATE | Command::SNP_ACTIVATE_EX);
    let p = snp_guest_in(state, !activating);
    let (next, out, gpa) = (PAGE + 0x1000, PAGE + 0x2000, 0x8000);
    p.rmpupdate(out, &RmpUpdate::firmware()).unwrap();
    let buffer = CommandBuffer::new(command).with("gctx_paddr", GCTX);
    let mut buffer = match command {
        Command::SNP_LAUNCH_START => buffer.with("policy", 0x3_0000),
        Command::SNP_ACTIVATE => buffer.with("asid", 2),
        Command::SNP_ACTIVATE_EX => buffer.with("asid", 2).with("ex_len", 0x20),
        Command::SNP_LAUNCH_UPDATE => {
            p.rmpupdate(next, &RmpUpdate::pre_guest(1, 0x9000)).unwrap();
            buffer.with("flags", 3 << 1).with("address", next)
        }
        Command::SNP_GUEST_REQUEST => {
            let mut page = [0; 4096];
            let at = soft_amd_sp::GuestPage::new(1, gpa, PAGE);
            if p.guest_read(&at, &mut page).is_ok() {
                let channel = soft_amd_sp::message::GuestChannel::from_secrets_page(&page, 0);
                let request = channel.unwrap().report_request(&[0; 64], 0).unwrap();
                p.host_write(SCRATCH, &request).unwrap();
            }
            buffer.with("req_paddr", SCRATCH).with("res_paddr", out)
        }
        Command::SNP_PAGE_MOVE => {
            p.rmpupdate(next, &RmpUpdate::pre_guest(1, gpa)).unwrap();
            // Refused where there is no page to fix.
            let _ = p.rmpupdate(PAGE, &RmpUpdate::pre_guest(1, gpa));
            buffer.with("src", PAGE).with("dst", next)
        }
        Command::SNP_DBG_DECRYPT => buffer.with("src", PAGE).with("dst", out),
        Command::SNP_DBG_ENCRYPT => buffer.with("src", SCRATCH).with("dst", PAGE),
        Command::SNP_GUEST_STATUS => buffer.with("address", out),
        _ => buffer,
    };
    let name = |p: &Platform| p.snapshot().snp_guests.first().map(|g| g.state.to_string());
    let before = name(&p);
    let status = p.run(&mut buffer);
    cell(status, before, name(&p))
}

// --- The page ---

/// A table: command, then one cell per state.
pub type Table = Vec<(Command, Vec<String>)>;

pub fn platform_table() -> Table {
    let peer = sev(2);
    let row = |c: &Command| {
        PLATFORM_STATES
            .map(|s| platform_cell(*c, s, &peer))
            .to_vec()
    };
    PLATFORM.iter().map(|c| (*c, row(c))).collect()
}

pub fn guest_table() -> Table {
    let columns = GuestState::ALL.map(guest_column);
    let row = |i: usize| columns.iter().map(|c| c[i].clone()).collect();
    GUEST_COMMANDS
        .iter()
        .enumerate()
        .map(|(i, c)| (*c, row(i)))
        .collect()
}

pub fn snp_platform_table() -> Table {
    let row = |c: &Command| [false, true].map(|s| snp_platform_cell(*c, s)).to_vec();
    SNP_PLATFORM.iter().map(|c| (*c, row(c))).collect()
}

pub fn snp_guest_table() -> Table {
    let row = |c: &Command| SnpState::ALL.map(|s| snp_guest_cell(*c, s)).to_vec();
    SNP_COMMANDS.iter().map(|c| (*c, row(c))).collect()
}

fn print(out: &mut String, title: &str, states: &[String], table: &Table) {
    let _ = writeln!(out, "\n## {title}\n");
    let _ = writeln!(out, "| command | {} |", states.join(" | "));
    let _ = writeln!(out, "|---|{}", "---|".repeat(states.len()));
    for (command, cells) in table {
        let cells: Vec<_> = cells.iter().map(|c| format!("`{c}`")).collect();
        let _ = writeln!(out, "| {command} | {} |", cells.join(" | "));
    }
}

/// The whole documentation page.
pub fn page() -> String {
    let mut out = String::from(
        "# Commands by state\n\n\
         Printed by `cargo run --example states`, which tries every command on the running model\n\
         in every state, with parameters that are valid where the state allows it. A test compares\n\
         this page with what the command prints.\n\n\
         `=` it worked and the state stayed, `->X` it worked and led to X, `free` the guest ended;\n\
         a number is the status it was refused with: `0x01` INVALID_PLATFORM_STATE,\n\
         `0x02` INVALID_GUEST_STATE.\n",
    );
    let names =
        |list: &[&dyn std::fmt::Display]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    let platform = PLATFORM_STATES.map(|s| s.to_string());
    print(
        &mut out,
        "Platform, SEV and SEV-ES",
        &platform,
        &platform_table(),
    );
    let guest = GuestState::ALL.map(|s| s.to_string());
    print(&mut out, "SEV and SEV-ES guest", &guest, &guest_table());
    let snp = names(&[&"UNINIT", &"INIT"]);
    print(&mut out, "Platform, SEV-SNP", &snp, &snp_platform_table());
    let snp_guest = SnpState::ALL.map(|s| s.to_string());
    print(&mut out, "SEV-SNP guest", &snp_guest, &snp_guest_table());
    out
}
