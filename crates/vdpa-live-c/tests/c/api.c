/*
 * What update.c does not use: error texts, roll-back, successors that fail, the transport of the caller, hand-over.
 *
 *   api texts DIRECTORY         without a device
 *   api rolled-back DEVICE FILE
 *   api transport DEVICE FILE
 *   api hand-over DEVICE FILE
 *
 * "load" and "receive" are what it starts as its own successors.
 */
#define main update_main
#include "../../examples/update.c"
#undef main

#include <errno.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>

extern char **environ;

/* A call that must fail with this number, and with a text that has this part. */
#define fails(call, number, part) expect(#call, (call), -(number), (part))

static void expect(const char *call, int result, int wanted, const char *part)
{
    if (result != wanted)
        errx(1, "%s: %d instead of %d: %s", call, result, wanted, result < 0 ? vdpa_live_error() : "");
    if (wanted < 0 && strstr(vdpa_live_error(), part) == NULL)
        errx(1, "%s: \"%s\" does not have \"%s\"", call, vdpa_live_error(), part);
}

static unsigned messages;

static void count(void *opaque, int level, const char *text)
{
    fails(vdpa_live_set_log(NULL, NULL), EBUSY, "by the function that it has set");
    fprintf(stderr, "<%d>%s\n", level, text);
    ++*(unsigned *)opaque;
}

static void texts(const char *directory)
{
    struct vdpa_live_session *none = (struct vdpa_live_session *)&none;
    struct vdpa_live_memory *ram;
    struct vdpa_live_plan *plan;
    struct vdpa_live_incoming *incoming;
    struct vdpa_live_device_info info;
    char path[4096];
    int file;

    fails(vdpa_live_open(NULL, 0, 0, &none), EINVAL, "path is NULL");
    expect("the session is NULL after a failure", none == NULL ? 0 : 1, 0, "");
    fails(vdpa_live_open("/dev/none", 0, 0, NULL), EINVAL, "session is NULL");
    fails(vdpa_live_open("\xff", 0, 0, &none), EINVAL, "path is not UTF-8");
    snprintf(path, sizeof(path), "%s/none", directory);
    fails(vdpa_live_open(path, 0, 0, &none), ENOENT, "there is no such file; vdpactl -s dev show");
    snprintf(path, sizeof(path), "%s/file", directory);
    file = open(path, O_RDWR | O_CREAT, 0600);
    fails(vdpa_live_open(path, 0, 0, &none), ENOTTY, "this is no vhost-vdpa device");
    fails(vdpa_live_offered(file, &info), ENOTTY, "this is no vhost-vdpa device");
    fails(vdpa_live_from_fd(-1, NULL, 0, 0, &none), EINVAL, "fd is -1, which is no descriptor");
    fails(vdpa_live_from_fd(9999, NULL, 0, 0, &none), EBADF, "fd (9999) cannot be used");
    fails(vdpa_live_assume(file, NULL, NULL, &none), EINVAL, "present is NULL");
    fails(vdpa_live_start(NULL), EINVAL, "session is NULL");
    fails(vdpa_live_map(NULL, NULL, 1), EINVAL, "regions cannot be an array of 1 elements");
    fails(vdpa_live_map(NULL, NULL, 0), EINVAL, "session is NULL");
    fails(vdpa_live_enable_queue(NULL, 70000, 1), EINVAL, "queue 70000 cannot exist");
    fails(vdpa_live_memory_new("ram", file, 0, 4096, NULL, &ram), EINVAL, "has 4096 bytes from byte 0 of its memory object on");
    fails(vdpa_live_memory_new("ram", -1, 0, 4096, (void *)1, &ram), EINVAL, "must be a multiple of 4096");
    fails(vdpa_live_memory_new("ram", -1, 0, 0, (void *)4096, &ram), EINVAL, "the size not 0");
    check(vdpa_live_memory_new("ram", -1, 0, 4096, NULL, &ram));
    vdpa_live_memory_free(ram);
    check(vdpa_live_plan_new(&plan));
    fails(vdpa_live_exec(plan, "/bin/true", NULL, NULL), EINVAL, "the plan has no session");
    fails(vdpa_live_exec(NULL, "/bin/true", NULL, NULL), EINVAL, "plan is NULL");
    fails(vdpa_live_plan_descriptor(plan, "log", 9999), EBADF, "fd (9999) cannot be used");
    check(vdpa_live_plan_descriptor(plan, "log", 2));
    fails(vdpa_live_plan_descriptor(plan, "log", 2), EEXIST, "descriptor \"log\" is in the plan already");
    vdpa_live_plan_free(plan);
    fails(vdpa_live_load("no state", 8, NULL, 0, &incoming), EBADMSG, "saved state has 8 bytes");
    fails(vdpa_live_receive(file, 0, &incoming), EINVAL, "not a Unix stream socket");
    expect("a first start", vdpa_live_inherit(&incoming), 0, "");
    fails(vdpa_live_incoming_step(NULL), EINVAL, "incoming is NULL");
    if (vdpa_live_incoming_report(NULL) != NULL)
        errx(1, "a report of nothing");
    /* Nothing to free is no error. */
    vdpa_live_close(NULL), vdpa_live_memory_free(NULL), vdpa_live_plan_free(NULL), vdpa_live_update_free(NULL);
    vdpa_live_saved_free(NULL), vdpa_live_incoming_free(NULL);
    close(file);
}

static struct vdpa_live_plan *plan_of(uint32_t strategy)
{
    struct vdpa_live_plan *plan;
    check(vdpa_live_plan_new(&plan));
    check(vdpa_live_plan_session(plan, "disk", session, strategy));
    fails(vdpa_live_plan_session(plan, "other", session, strategy), EEXIST, "as \"disk\"");
    fails(vdpa_live_plan_session(plan, "other", session, 9), EINVAL, "strategy 9 is none");
    return plan;
}

/* Updates that fail at every step, under load; each time the device goes on here. */
static void rolled_back(const char *path)
{
    const uint32_t strategies[] = {VDPA_LIVE_LIVE, VDPA_LIVE_RESUME, VDPA_LIVE_RESET, VDPA_LIVE_REOPEN};
    struct vdpa_live_region region, other = {.name = "other", .iova = 1 << 30, .size = 4096, .perm = 7};
    struct vdpa_live_device_info info;
    struct vdpa_live_session *second;
    struct vdpa_live_update *update;
    struct vdpa_live_saved *saved;
    struct vdpa_live_plan *plan;
    struct pollfd ready = {.events = POLLIN};
    uint32_t base;
    int result;

    fails(vdpa_live_open(path, 0, 0, &second), EBUSY, "this process has it open already, as descriptor");
    check(vdpa_live_session_info(session, &info));
    expect("a disk", (int)info.device_id, 2, "");
    fails(vdpa_live_add_queue(session, &queue), EBUSY, "the device runs already");
    fails(vdpa_live_find_queue(session, 9, &queue), ENOENT, "queue 9 is not set up");
    fails(vdpa_live_read_config(session, 0, &info, 1 << 20), ERANGE, "the configuration space has ");
    check(vdpa_live_find_region(session, "memory", &region));
    other.memory = region.memory;
    fails(vdpa_live_map(session, &other, 1), EINVAL, "perm is 0x7");
    other.perm = VDPA_LIVE_READ;
    other.iova += 1;
    fails(vdpa_live_map(session, &other, 1), EINVAL, "both must be multiples of 4096");
    other.iova -= 1;
    check(vdpa_live_map(session, &other, 1));
    fails(vdpa_live_map(session, &other, 1), EEXIST, "region \"other\" exists already");
    check(vdpa_live_unmap(session, "other"));
    fails(vdpa_live_unmap(session, "other"), ENOENT, "region \"other\" does not exist");
    check(vdpa_live_map_at(session, region.memory, 0, 1 << 30, 4096, VDPA_LIVE_READ));
    fails(vdpa_live_unmap_at(session, 1 << 30, 8192), ENOENT, "is not mapped at");
    check(vdpa_live_unmap_at(session, 1 << 30, 4096));
    vdpa_live_memory_free(region.memory);

    for (unsigned at = 0; at < 4; at++) {
        plan = plan_of(strategies[at]);
        fails(vdpa_live_exec(plan, "/no/such/program", NULL, NULL), ENOENT, "the new image /no/such/program cannot be run");
        fails(vdpa_live_exec(plan, "/dev/null", NULL, NULL), EINVAL, "it is not a regular file");
        drive(memory->verified + 100, 1);
        check(vdpa_live_save(plan, &saved));
        fails(vdpa_live_status(session), EBUSY, "the device is stopped for an update");
        check(vdpa_live_roll_back(saved, "a test", 0));
        fails(vdpa_live_release(saved), EINVAL, "rolled back or released before");
        vdpa_live_saved_free(saved);
        expect("it runs", vdpa_live_status(session), 15, "");
        drive(memory->verified + 100, 1);
        vdpa_live_plan_free(plan);
    }

    plan = plan_of(VDPA_LIVE_BEST);
    check(vdpa_live_fork(plan, "/bin/false", NULL, NULL, &update));
    fails(vdpa_live_update_switch(update), EINVAL, "the successor is not ready");
    ready.fd = check(vdpa_live_update_fd(update));
    while ((result = vdpa_live_update_step(update)) == 0)
        poll(&ready, 1, -1);
    fails(result, ECHILD, "has ended before it was ready: exit status: 1");
    vdpa_live_update_free(update);
    check(vdpa_live_plan_limits(plan, 200, 0, 100));
    check(vdpa_live_fork(plan, "/bin/sleep", (const char *[]){"sleep", "100", NULL}, NULL, &update));
    ready.fd = check(vdpa_live_update_fd(update));
    while ((result = vdpa_live_update_step(update)) == 0)
        poll(&ready, 1, -1);
    fails(result, ETIMEDOUT, "was not ready within 200ms");
    vdpa_live_update_free(update);
    drive(memory->verified + 100, 1);

    check(vdpa_live_memory_new("heap", -1, 0, 4096, NULL, &other.memory));
    check(vdpa_live_map(session, &other, 1));
    vdpa_live_memory_free(other.memory);
    fails(vdpa_live_exec(plan, "/bin/true", NULL, NULL), EINVAL, "is private memory, which ends with this program");
    check(vdpa_live_unmap(session, "other"));
    check(vdpa_live_suspend(session));
    check(vdpa_live_vring_base(session, 0, &base));
    expect("all that was given is done", base == memory->avail.index ? 0 : 1, 0, "");
    fails(vdpa_live_plan_session(plan, "x", NULL, 0), EINVAL, "session is NULL");
    check(vdpa_live_resume(session));
    drive(memory->verified + 100, 1);
    vdpa_live_plan_free(plan);
}

/* Starts this program as a successor, with descriptor fd. */
static pid_t start(const char *role, int fd)
{
    char number[16];
    pid_t child;
    snprintf(number, sizeof(number), "%d", fd);
    if (posix_spawn(&child, "/proc/self/exe", NULL, NULL, (char *[]){"api", (char *)role, number, NULL}, environ) != 0)
        errx(1, "posix_spawn");
    return child;
}

static int ended(pid_t child)
{
    int status;
    if (waitpid(child, &status, 0) != child || !WIFEXITED(status))
        errx(1, "the successor has not ended by itself");
    return WEXITSTATUS(status);
}

/* The state goes to a successor as bytes and descriptors over a socket; that one takes over, and ends. */
static void transport(void)
{
    struct vdpa_live_plan *plan = plan_of(VDPA_LIVE_BEST);
    struct vdpa_live_saved *saved;
    struct vdpa_live_incoming *incoming;
    struct vdpa_live_descriptor all[16];
    const void *bytes;
    size_t size;
    int pair[2], number = 0;

    check(vdpa_live_plan_section(plan, "update/count", 1, 0, &(unsigned){0}, sizeof(unsigned)));
    check(vdpa_live_save(plan, &saved));
    check(vdpa_live_saved_bytes(saved, &bytes, &size));
    for (; number < check(vdpa_live_saved_descriptor_count(saved)); number++)
        all[number].fd = check(vdpa_live_saved_descriptor(saved, (size_t)number, &all[number].name));
    fails(vdpa_live_saved_descriptor(saved, 99, NULL), ERANGE, "none with number 99");
    fails(vdpa_live_load(bytes, size, all + 1, (size_t)number - 1, &incoming), EBADMSG, "it was not given");
    fails(vdpa_live_load(bytes, size - 1, all, (size_t)number, &incoming), EBADMSG, "saved state claims");

    /* Its bytes in a file, its descriptors by inheritance, under the numbers that the file has. */
    pair[0] = memfd_create("state", 0);
    for (int at = 0; at < number; at++) {
        char line[256];
        int inherited = dup(all[at].fd);
        int length = snprintf(line, sizeof(line), "%d %s\n", inherited, all[at].name);
        if (write(pair[0], line, (size_t)length) != length)
            errx(1, "write");
    }
    if (write(pair[0], "\n", 1) != 1 || write(pair[0], bytes, size) != (ssize_t)size)
        errx(1, "write");
    expect("the successor", ended(start("load", pair[0])), 0, "");
    for (int fd = 3; fd < 64; fd++)
        if (fd > pair[0] && (fcntl(fd, F_GETFD) & FD_CLOEXEC) == 0)
            close(fd);
    check(vdpa_live_roll_back(saved, NULL, 1));
    vdpa_live_saved_free(saved);
    vdpa_live_plan_free(plan);
    drive(memory->verified + 1000, 1);
}

static void load(int file)
{
    static char text[1 << 16];
    struct vdpa_live_descriptor all[16];
    struct vdpa_live_incoming *incoming;
    struct vdpa_live_known known = {"update/other", 1, 1};
    ssize_t size = pread(file, text, sizeof(text), 0);
    char *at = text;
    size_t number = 0;

    for (; *at != '\n'; number++) {
        all[number].fd = (int)strtol(at, &at, 10);
        all[number].name = at + 1;
        at = strchr(at, '\n');
        *at++ = '\0';
    }
    check(vdpa_live_load(at + 1, (size_t)(text + size - at - 1), all, number, &incoming));
    expect("it is there", vdpa_live_incoming_step(incoming), VDPA_LIVE_OFFERED, "");
    fails(vdpa_live_incoming_fd(incoming), EINVAL, "the update is there and the devices are not taken over yet");
    fails(vdpa_live_incoming_descriptor(incoming, "log"), ENOENT, "has passed no descriptor \"log\"");
    fails(vdpa_live_incoming_session(incoming, "disk", &session), EINVAL, "needs devices that are taken over");
    fails(vdpa_live_incoming_understands(incoming, &known, 1), EBADMSG, "a section \"update/count\" (version 1)");
    vdpa_live_incoming_free(incoming);
    check(vdpa_live_load(at + 1, (size_t)(text + size - at - 1), all, number, &incoming));
    take_over(incoming);
    drive(memory->verified + 1000, 1);
    /* Ends without a word, with requests in flight. */
    _exit(0);
}

static void step_until(struct vdpa_live_incoming *incoming, int wanted)
{
    struct pollfd ready = {.fd = check(vdpa_live_incoming_fd(incoming)), .events = POLLIN};
    while (check(vdpa_live_incoming_step(incoming)) != wanted)
        poll(&ready, 1, -1);
}

/* The successor refuses the first time, the second one takes over, with guest memory that it has mapped itself. */
static void receive(int socket)
{
    struct vdpa_live_incoming *incoming;
    struct vdpa_live_memory *ram;
    struct vdpa_live_memory_info info;
    void *mapped;

    check(vdpa_live_receive(socket, 10000, &incoming));
    step_until(incoming, VDPA_LIVE_OFFERED);
    if (fcntl(socket, F_GETFD) != -1 && getenv("API_REFUSE") != NULL) {
        check(vdpa_live_incoming_refuse(incoming, "not today"));
        fails(vdpa_live_take_over(incoming), EINVAL, "the update is over: it was refused");
        vdpa_live_incoming_free(incoming);
        return;
    }
    fails(vdpa_live_incoming_memory(incoming, 1, &ram), ERANGE, "there are 1 memories, and none with number 1");
    check(vdpa_live_incoming_memory(incoming, 0, &ram));
    check(vdpa_live_memory_info(ram, &info));
    mapped = mmap(NULL, info.size, PROT_READ | PROT_WRITE, MAP_SHARED, info.fd, (off_t)info.offset);
    check(vdpa_live_memory_bring(ram, mapped));
    fails(vdpa_live_memory_bring(ram, mapped), EINVAL, "is mapped already");
    vdpa_live_memory_free(ram);
    expect("it waits for the switch", vdpa_live_take_over(incoming), VDPA_LIVE_WAIT, "");
    step_until(incoming, VDPA_LIVE_TAKEN);
    if (strstr(vdpa_live_incoming_report(incoming), "hand-over of 1 device in") == NULL)
        errx(1, "%s", vdpa_live_incoming_report(incoming));
    check(vdpa_live_incoming_session(incoming, "disk", &session));
    fails(vdpa_live_incoming_session(incoming, "disk", &(struct vdpa_live_session *){NULL}), ENODEV, "no device \"disk\"");
    vdpa_live_incoming_free(incoming);
    memory = mapped;
    check(vdpa_live_find_queue(session, 0, &queue));
    drive(memory->verified + 1000, 1);
    drive(0, 0);
    vdpa_live_close(session);
}

static void hand_over(const char *path)
{
    struct pollfd ready = {.events = POLLIN};
    struct vdpa_live_update *update;
    struct vdpa_live_plan *plan = plan_of(VDPA_LIVE_BEST);
    struct vdpa_live_region region;
    struct vdpa_live_memory_info info;
    struct vdpa_live_memory *moved;
    int pair[2], result;
    pid_t child;
    void *mapped;

    /* The memory is moved in this program first. */
    check(vdpa_live_find_region(session, "memory", &region));
    check(vdpa_live_memory_info(region.memory, &info));
    mapped = mmap(NULL, info.size, PROT_READ | PROT_WRITE, MAP_SHARED, info.fd, (off_t)info.offset);
    check(vdpa_live_memory_new("moved", info.fd, info.offset, info.size, mapped, &moved));
    vdpa_live_memory_free(region.memory);
    check(vdpa_live_remap(session, "memory", moved));
    vdpa_live_memory_free(moved);
    memory = mapped;
    drive(memory->verified + 100, 1);

    for (int refuses = 1; refuses >= 0; refuses--) {
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0 || fcntl(pair[0], F_SETFD, FD_CLOEXEC) != 0)
            errx(1, "socketpair");
        if (refuses)
            setenv("API_REFUSE", "1", 1);
        else
            unsetenv("API_REFUSE");
        child = start("receive", pair[1]);
        close(pair[1]);
        check(vdpa_live_hand_over(plan, pair[0], &update));
        ready.fd = check(vdpa_live_update_fd(update));
        while ((result = vdpa_live_update_step(update)) == 0)
            poll(&ready, 1, -1);
        if (refuses) {
            fails(result, ECANCELED, "refused: not today");
            drive(memory->verified + 100, 1);
        } else {
            check(result);
            expect("it has said who it is", vdpa_live_update_successor(update) == child ? 0 : 1, 0, "");
            check(vdpa_live_update_switch(update));
            fails(vdpa_live_start(session), ENODEV, "a successor has it");
        }
        vdpa_live_update_free(update);
        expect(refuses ? "the one that refuses" : "the successor", ended(child), 0, "");
        close(pair[0]);
    }
    compare(path);
    vdpa_live_plan_free(plan);
}

int main(int argc, char **argv)
{
    const char *role = argc < 3 ? "" : argv[1];
    check(vdpa_live_set_log(count, &messages));
    if (strcmp(role, "texts") == 0) {
        texts(argv[2]);
    } else if (strcmp(role, "load") == 0) {
        load(atoi(argv[2]));
    } else if (strcmp(role, "receive") == 0) {
        receive(atoi(argv[2]));
    } else {
        first_start(argv[2]);
        drive(PER_IMAGE, 1);
        if (strcmp(role, "rolled-back") == 0)
            rolled_back(argv[2]);
        else if (strcmp(role, "transport") == 0)
            transport();
        else if (strcmp(role, "hand-over") == 0)
            hand_over(argv[3]);
        else
            errx(1, "unknown: %s", role);
        if (strcmp(role, "hand-over") != 0) {
            drive(0, 0);
            compare(argv[3]);
        }
        vdpa_live_close(session);
        expect("it has told what happens", messages > 0 ? 0 : 1, 0, "");
    }
    printf("%s: as it should be\n", role);
    return 0;
}
