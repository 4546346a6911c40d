//! A process under test: this test binary again. It executes the commands that it reads from its standard input, one per
//! line.
//!
//! It does so before `main`, so that the thread that executes them is the process's first and only one.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;

use vdpa_sys::mmap::{Prot, SharedMap};

const ROLE: &str = "VDPA_SYS_TEST_SUBJECT";

/// The process; killed when dropped, with all its children.
#[derive(Debug)]
pub(crate) struct Subject {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Its first thread.
    pub(crate) tid: i32,
}

impl Subject {
    pub(crate) fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(ROLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut subject = Self { child, input, output, tid: 0 };
        subject.tid = i32::try_from(subject.read_reply()).unwrap();
        subject
    }

    /// Executes a command in the process and returns the number that it replies.
    pub(crate) fn run(&mut self, command: &str) -> u64 {
        writeln!(self.input, "{command}").unwrap();
        self.read_reply()
    }

    /// As [`run`](Self::run), for commands that reply with a thread or process id.
    pub(crate) fn run_id(&mut self, command: &str) -> i32 {
        i32::try_from(self.run(command)).unwrap()
    }

    /// Executes a command that ends the process. Returns the signal that ended it.
    pub(crate) fn run_fatal(&mut self, command: &str) -> Option<i32> {
        writeln!(self.input, "{command}").unwrap();
        std::os::unix::process::ExitStatusExt::signal(&self.child.wait().unwrap())
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn read_reply(&mut self) -> u64 {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().parse().unwrap_or_else(|_| panic!("the subject replied {line:?}"))
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = {
    extern "C" fn run_as_subject() {
        if std::env::var_os(ROLE).is_some() {
            // SAFETY: prctl with a signal number has no precondition.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            reply(tid());
            execute_commands();
        }
    }
    run_as_subject
};

fn tid() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

fn reply(number: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{number}").and_then(|()| out.flush()).unwrap();
}

fn execute_commands() -> ! {
    let mut input = BufReader::new(std::io::stdin());
    loop {
        let mut line = String::new();
        if input.read_line(&mut line).unwrap() == 0 {
            std::process::exit(0);
        }
        match line.trim() {
            "thread" => drop(thread::spawn(|| {
                reply(tid());
                park();
            })),
            "fork" => reply(fork()),
            "clone_vm" => reply(clone_vm()),
            "exec" => exec(),
            "exec from thread" => {
                thread::spawn(exec);
                park();
            }
            "exit the first thread" => {
                thread::spawn(|| {
                    wait_until_first_thread_is_zombie();
                    reply(tid());
                    execute_commands();
                });
                // SAFETY: ends this thread alone; nothing on its stack is used by another.
                unsafe { libc::syscall(libc::SYS_exit, 0) };
            }
            // SAFETY: neither call takes a pointer.
            "no aslr" => reply(unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as u64) }),
            // SAFETY: as above.
            "undumpable" => reply(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) }),
            "map shared" => reply(map(libc::MAP_SHARED).addr()),
            "map private" => reply(map(libc::MAP_PRIVATE).addr()),
            "truncate a guest mapping" => reply(u8::from(truncate_and_access(&guest_map()))),
            "truncate another mapping" => {
                let _handler = guest_map();
                truncate_and_access(&plain_map());
            }
            "send itself SIGBUS" => {
                let _handler = guest_map();
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::BUS)
                    .unwrap();
                park();
            }
            "map with a hole" => {
                let addr = map(libc::MAP_SHARED);
                // SAFETY: the second of three pages just mapped, into which there are no references.
                unsafe { libc::munmap(addr.byte_add(4096), 4096) };
                reply(addr.addr());
            }
            other => panic!("unknown command {other:?}"),
        }
    }
}

fn park() -> ! {
    loop {
        thread::park();
    }
}

/// Three pages of anonymous memory that begin with "subject".
fn map(flags: i32) -> *mut libc::c_void {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the kernel picks free addresses.
    let addr = unsafe { libc::mmap(std::ptr::null_mut(), 12288, prot, flags | libc::MAP_ANONYMOUS, -1, 0) };
    assert_ne!(addr, libc::MAP_FAILED);
    // SAFETY: the first 7 of 12288 bytes just mapped.
    unsafe { std::ptr::copy_nonoverlapping(b"subject".as_ptr(), addr.cast(), 7) };
    addr
}

type Mapping = (OwnedFd, SharedMap);

fn guest_map() -> Mapping {
    let fd = vdpa_sys::memfd::create(c"subject", 4096, None).unwrap();
    let map = SharedMap::map_guest(&fd, 0, 4096, Prot::RW, false).unwrap();
    (fd, map)
}

fn plain_map() -> Mapping {
    let fd = vdpa_sys::memfd::create(c"subject", 4096, None).unwrap();
    let map = SharedMap::map(&fd, 0, 4096, Prot::RW, false).unwrap();
    (fd, map)
}

/// Truncates the file and accesses the mapping. Returns whether the access failed.
fn truncate_and_access((fd, map): &Mapping) -> bool {
    rustix::fs::ftruncate(fd, 0).unwrap();
    map.write(0, b"x").is_err()
}

fn wait_until_first_thread_is_zombie() {
    let path = format!("/proc/self/task/{}/stat", std::process::id());
    while !std::fs::read_to_string(&path).unwrap().contains(") Z ") {
        thread::yield_now();
    }
}

fn exec() {
    let exe = std::ffi::CString::new(std::env::current_exe().unwrap().into_os_string().into_encoded_bytes())
        .unwrap();
    let env = [std::ffi::CString::new(format!("{ROLE}=1")).unwrap()];
    let program = vdpa_sys::exec::Program::Path(&exe);
    panic!("{:?}", vdpa_sys::exec::execve(program, std::slice::from_ref(&exe), &env));
}

fn fork() -> i32 {
    let (ready, child_end) = rustix::pipe::pipe().unwrap();
    // SAFETY: the child only makes system calls.
    match unsafe { libc::fork() } {
        0 => idle(&child_end),
        pid => wait_until_idle(&ready, pid),
    }
}

fn clone_vm() -> i32 {
    extern "C" fn child(ready: *mut libc::c_void) -> libc::c_int {
        // SAFETY: the address of `child_end` below, whose owner waits for what is written to it.
        idle(unsafe { &*ready.cast::<OwnedFd>() })
    }
    let (ready, child_end) = rustix::pipe::pipe().unwrap();
    let stack = Box::leak(vec![0_u128; 4096].into_boxed_slice());
    let argument = (&raw const child_end).cast_mut().cast();
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    // SAFETY: the stack is 64 KiB that nothing else uses, ever; the child only makes system calls.
    let pid = unsafe { libc::clone(child, stack.as_mut_ptr_range().end.cast(), flags, argument) };
    wait_until_idle(&ready, pid)
}

fn wait_until_idle(ready: &OwnedFd, pid: i32) -> i32 {
    assert!(pid > 0);
    assert_eq!(rustix::io::read(ready, &mut [0]), Ok(1));
    pid
}

/// Waits to be killed together with the parent.
fn idle(ready: &OwnedFd) -> ! {
    // SAFETY: prctl with a signal number has no precondition.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let _ = rustix::io::write(ready, &[1]);
    loop {
        // SAFETY: pause has no precondition.
        unsafe { libc::pause() };
    }
}
