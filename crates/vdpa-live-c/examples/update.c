/*
 * A program that replaces itself by exec while requests are in flight, and verifies every block: update DEVICE FILE UPDATES
 * DEVICE is a disk of vdpad (kind blk), FILE the file behind it. Each of SLOTS requests writes a block, reads it back, and goes on
 * to the next. At the end all blocks are compared with FILE, past the device.
 *   cc -std=c11 -o update update.c $(pkg-config --cflags --libs libvdpa-live)
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <vdpa-live.h>

enum { ENTRIES = 64, SLOTS = 16, BLOCKS = 1024, WORDS = 512, PER_IMAGE = 2000 };
#define IOVA 0x100000ull

/* The memory of the device: ring, requests, data; and what the next image goes on with. */
struct memory {
    struct vring_desc desc[ENTRIES];
    struct { uint16_t flags, index, ring[ENTRIES], used_event; } avail;
    struct { uint32_t flags_and_index; struct vring_used_elem ring[ENTRIES]; uint16_t avail_event; } used;
    struct request {
        struct virtio_blk_outhdr header;
        uint8_t status;
        uint64_t block, sequence;
    } requests[SLOTS];
    uint64_t data[SLOTS][WORDS];
    uint16_t reaped, in_flight;
    uint64_t verified, sequence_of[BLOCKS];
};

static struct vdpa_live_session *session;
static struct memory *memory;
static struct vdpa_live_queue queue;
/* Where the device finds a part of the memory. */
#define iova(part) (IOVA + (uint64_t)((const char *)(part) - (const char *)memory))

/* The value of a call of the library, or the end with its text. */
static int check(int result)
{
    if (result < 0)
        errx(1, "%s", vdpa_live_error());
    return result;
}

/* Word number at of a block: each has the number of the block, and how often it was written. */
static uint64_t word(const struct request *request, uint64_t at)
{
    return (request->block << 40) ^ (request->sequence << 10) ^ at;
}

/* Gives request number slot to the device: it reads header and data, or writes data, and writes the status. */
static void submit(uint16_t slot, uint32_t type)
{
    struct request *request = &memory->requests[slot];
    struct vring_desc *desc = &memory->desc[3 * slot];
    uint16_t data = type == VIRTIO_BLK_T_IN ? VRING_DESC_F_WRITE : 0, index = memory->avail.index;
    for (uint64_t at = 0; at < WORDS; at++)
        memory->data[slot][at] = type == VIRTIO_BLK_T_OUT ? word(request, at) : 0;
    request->header = (struct virtio_blk_outhdr){.type = type, .sector = request->block * 8};
    request->status = 0xff;
    desc[0] = (struct vring_desc){iova(&request->header), 16, VRING_DESC_F_NEXT, 3 * slot + 1};
    desc[1] = (struct vring_desc){iova(memory->data[slot]), 8 * WORDS, data | VRING_DESC_F_NEXT, 3 * slot + 2};
    desc[2] = (struct vring_desc){iova(&request->status), 1, VRING_DESC_F_WRITE, 0};
    memory->avail.ring[index % ENTRIES] = 3 * slot;
    memory->in_flight++;
    __atomic_store_n(&memory->avail.index, (uint16_t)(index + 1), __ATOMIC_RELEASE);
    eventfd_write(queue.kick, 1);
}

/* A request is done: what was written is read, what was read is compared and the next block of this slot is written. */
static void completed(uint16_t slot, int more)
{
    struct request *request = &memory->requests[slot];
    memory->in_flight--;
    if (request->status != VIRTIO_BLK_S_OK)
        errx(1, "a request has failed");
    memory->sequence_of[request->block] = request->sequence;
    if (request->header.type == VIRTIO_BLK_T_OUT) {
        submit(slot, VIRTIO_BLK_T_IN);
        return;
    }
    for (uint64_t at = 0; at < WORDS; at++)
        if (memory->data[slot][at] != word(request, at))
            errx(1, "a block is not what was written");
    memory->verified++;
    request->block = (request->block + SLOTS) % BLOCKS;
    request->sequence++;
    if (more)
        submit(slot, VIRTIO_BLK_T_OUT);
}

/* Waits for the device and reaps until limit blocks are verified; with more 0 until nothing is in flight. */
static void drive(uint64_t limit, int more)
{
    struct pollfd call = {.fd = queue.call, .events = POLLIN};
    while (more ? memory->verified < limit : memory->in_flight > 0) {
        uint16_t used = (uint16_t)(__atomic_load_n(&memory->used.flags_and_index, __ATOMIC_ACQUIRE) >> 16);
        if (memory->reaped != used)
            completed((uint16_t)(memory->used.ring[memory->reaped++ % ENTRIES].id / 3), more);
        else if (poll(&call, 1, 10000) != 1 || eventfd_read(queue.call, &(eventfd_t){0}) != 0)
            errx(1, "no completion in 10 s");
    }
}

static void first_start(const char *path)
{
    struct vdpa_live_region region = {.name = "memory", .iova = IOVA, .perm = VDPA_LIVE_READ | VDPA_LIVE_WRITE};
    struct vdpa_live_memory_info info;
    int fd = memfd_create("update", MFD_CLOEXEC);
    region.size = (sizeof(*memory) + 4095) & ~4095ull;
    if (fd < 0 || ftruncate(fd, (off_t)region.size) != 0)
        errx(1, "memfd");
    check(vdpa_live_open(path, 1ull << VIRTIO_F_VERSION_1, 0, &session));
    check(vdpa_live_memory_new("memory", fd, 0, region.size, NULL, &region.memory));
    check(vdpa_live_map(session, &region, 1));
    check(vdpa_live_memory_info(region.memory, &info));
    memory = info.address;
    vdpa_live_memory_free(region.memory);
    close(fd);
    queue.size = ENTRIES;
    queue.desc = iova(memory->desc), queue.driver = iova(&memory->avail), queue.device = iova(&memory->used);
    queue.kick = eventfd(0, EFD_CLOEXEC), queue.call = eventfd(0, EFD_CLOEXEC);
    check(vdpa_live_add_queue(session, &queue));
    check(vdpa_live_start(session));
    for (uint16_t slot = 0; slot < SLOTS; slot++) {
        memory->requests[slot] = (struct request){.block = slot, .sequence = 1};
        submit(slot, VIRTIO_BLK_T_OUT);
    }
}

/* Takes the device over from the image before this one, with its requests in flight; returns how many updates there were. */
static unsigned take_over(struct vdpa_live_incoming *incoming)
{
    struct vdpa_live_region region;
    struct vdpa_live_memory_info info;
    unsigned updates;
    const void *state;
    size_t size;
    check(vdpa_live_incoming_section(incoming, "update/count", NULL, &state, &size));
    memcpy(&updates, state, sizeof(updates));
    check(vdpa_live_take_over(incoming));
    check(vdpa_live_incoming_session(incoming, "disk", &session));
    vdpa_live_incoming_free(incoming);
    check(vdpa_live_find_region(session, "memory", &region));
    check(vdpa_live_memory_info(region.memory, &info));
    memory = info.address;
    vdpa_live_memory_free(region.memory);
    check(vdpa_live_find_queue(session, 0, &queue));
    return updates + 1;
}

/* Compares the file behind the device with what was written. */
static void compare(const char *path)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    uint64_t words[WORDS];
    for (struct request at = {0}; at.block < BLOCKS; at.block++) {
        at.sequence = memory->sequence_of[at.block];
        if (pread(file, words, sizeof(words), (off_t)(at.block * sizeof(words))) != sizeof(words))
            errx(1, "the file is too short");
        for (uint64_t word_at = 0; at.sequence > 0 && word_at < WORDS; word_at++)
            if (words[word_at] != word(&at, word_at))
                errx(1, "the file does not have what was written");
    }
    close(file);
}

int main(int argc, char **argv)
{
    struct vdpa_live_incoming *incoming;
    struct vdpa_live_plan *plan;
    unsigned updates = 0;
    if (argc != 4)
        errx(1, "usage: update DEVICE FILE UPDATES");
    if (check(vdpa_live_inherit(&incoming)))
        updates = take_over(incoming);
    else
        first_start(argv[1]);
    drive((updates + 1) * PER_IMAGE, 1);
    if (updates < strtoul(argv[3], NULL, 10)) {
        check(vdpa_live_plan_new(&plan));
        check(vdpa_live_plan_session(plan, "disk", session, VDPA_LIVE_BEST));
        check(vdpa_live_plan_section(plan, "update/count", 1, 0, &updates, sizeof(updates)));
        check(vdpa_live_exec(plan, "/proc/self/exe", NULL, NULL)); /* The next image begins in main. */
    }
    drive(0, 0);
    compare(argv[2]);
    printf("%u updates, %llu blocks verified, nothing lost\n", updates, (unsigned long long)memory->verified);
    vdpa_live_close(session);
    return 0;
}
