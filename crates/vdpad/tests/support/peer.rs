//! [`Peer`]: another process that uses device files. It is this test program again, and executes commands.
//!
//! It branches off before `main`, so that it has one thread and may fork. Its standard input is a device file that
//! it inherits, its standard output the socket on which it receives commands.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vdpa_core::Errno;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::types::{Asid, Perm, QueueIndex};
use vdpa_sys::exec::{Program, execve};
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

const ROLE: &str = "VDPAD_TEST_PEER";

/// The process; killed when dropped.
pub(crate) struct Peer {
    child: Child,
    line: BufReader<UnixStream>,
}

impl Peer {
    /// A process without a device.
    pub(crate) fn start() -> Self {
        Self::spawn(Stdio::null())
    }

    /// A process that inherits a device.
    pub(crate) fn inheriting(device: &OwnedFd) -> Self {
        Self::spawn(Stdio::from(device.try_clone().unwrap()))
    }

    fn spawn(device: Stdio) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .env(ROLE, "1")
            .stdin(device)
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        Self { child, line: BufReader::new(ours) }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends one command of [`execute`] and returns its result.
    #[track_caller]
    pub(crate) fn send(&mut self, command: &str) -> Result<(), Errno> {
        writeln!(self.line.get_mut(), "{command}").unwrap();
        let mut answer = String::new();
        self.line.read_line(&mut answer).unwrap();
        match answer.trim().parse() {
            Ok(0) => Ok(()),
            Ok(raw) => Err(Errno::from_raw(raw)),
            Err(_) => panic!("the peer answers {answer:?} to {command:?}"),
        }
    }

    /// Ends the process and waits for it.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.end();
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = {
    extern "C" fn branch_off() {
        if std::env::var_os(ROLE).is_some() {
            vdpa_sys::exec::set_parent_death_signal(libc::SIGKILL).unwrap();
            execute();
        }
    }
    branch_off
};

/// State of the process.
struct State {
    devices: Vec<VhostVdpaFd>,
    /// The one in use.
    device: usize,
    memory: Vec<SharedMap>,
}

/// Executes commands until there are no more.
fn execute() -> ! {
    let socket = UnixStream::from(rustix::stdio::stdout().try_clone_to_owned().unwrap());
    let inherited = VhostVdpaFd::from_fd(rustix::stdio::stdin().try_clone_to_owned().unwrap());
    let mut state = State { devices: vec![inherited], device: 0, memory: Vec::new() };
    let mut input = BufReader::new(&socket);
    loop {
        let mut line = String::new();
        if input.read_line(&mut line).unwrap() == 0 {
            std::process::exit(0);
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let result = state.carry_out(&words);
        answer(&socket, result);
    }
}

fn answer(mut socket: &UnixStream, result: Result<(), Errno>) {
    writeln!(socket, "{}", result.map_or_else(|errno| errno.raw(), |()| 0)).unwrap();
}

impl State {
    fn carry_out(&mut self, words: &[&str]) -> Result<(), Errno> {
        let device = || &self.devices[self.device];
        match *words {
            // Whether it is there.
            ["hello"] => Ok(()),
            // Another device, used from now on.
            ["open", path] => {
                self.devices.push(VhostVdpaFd::open(path).map_err(|_| Errno::BUSY)?);
                self.device = self.devices.len() - 1;
                Ok(())
            }
            // The device opened as number N, 0 being the one inherited.
            ["use", number] => {
                self.device = parse(number);
                Ok(())
            }
            ["close"] => {
                self.devices.remove(self.device);
                self.device = 0;
                Ok(())
            }
            ["memlock", bytes] => {
                let maximum = getrlimit(Resource::Memlock).maximum;
                let limit = Rlimit { current: Some(parse(bytes) as u64), maximum };
                setrlimit(Resource::Memlock, limit).map_err(|error| Errno::from_raw(error.raw_os_error()))
            }
            ["owner"] => device().set_owner(),
            ["new_owner"] => device().new_owner(),
            ["features"] => device().features().map(drop),
            ["status"] => device().status().map(drop),
            ["num"] => device().set_vring_num(QueueIndex(0), 8),
            ["base"] => device().vring_base(QueueIndex(0)).map(drop),
            ["enable"] => device().set_vring_enable(QueueIndex(0), false),
            // Allocates this number of pages.
            ["map", iova, pages] => {
                let size = parse(pages) * 4096;
                let fd = memfd::create(c"peer", size as u64, None)?;
                let map = SharedMap::map(&fd, 0, size, Prot::RW, false)?;
                let uaddr = map.addr() as u64;
                device().dma_map(Asid(0), parse(iova) as u64, size as u64, uaddr, Perm::RW)?;
                self.memory.push(map);
                Ok(())
            }
            ["unmap", iova, pages] => {
                device().dma_unmap(Asid(0), parse(iova) as u64, parse(pages) as u64 * 4096)
            }
            ["thread", ref rest @ ..] => {
                std::thread::scope(|scope| scope.spawn(|| self.carry_out(rest)).join()).unwrap()
            }
            ["fork", ref rest @ ..] => self.fork(rest),
            ["exec"] => {
                let exe = std::env::current_exe().unwrap().into_os_string().into_encoded_bytes();
                let exe = std::ffi::CString::new(exe).unwrap();
                let env = [std::ffi::CString::new(format!("{ROLE}=1")).unwrap()];
                // Answered here, since the new image does not know of the command.
                let socket = UnixStream::from(rustix::stdio::stdout().try_clone_to_owned().unwrap());
                answer(&socket, Ok(()));
                execve(Program::Path(&exe), std::slice::from_ref(&exe), &env).map(|never| match never {})
            }
            _ => panic!("the peer does not know {words:?}"),
        }
    }

    /// Executes a command in a forked child.
    fn fork(&mut self, words: &[&str]) -> Result<(), Errno> {
        // SAFETY: this process has one thread, so its child is in no lock's way and may do whatever it does.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let result = self.carry_out(words);
            std::process::exit(result.map_or_else(|errno| errno.raw(), |()| 0));
        }
        let child = rustix::process::Pid::from_raw(child).unwrap();
        let status = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
        let (_, status) = status.unwrap().unwrap();
        match status.exit_status() {
            Some(0) => Ok(()),
            Some(raw) => Err(Errno::from_raw(raw)),
            None => panic!("the child ended by {status:?}"),
        }
    }
}

fn parse(number: &str) -> usize {
    match number.strip_prefix("0x") {
        Some(hex) => usize::from_str_radix(hex, 16).unwrap(),
        None => number.parse().unwrap(),
    }
}
