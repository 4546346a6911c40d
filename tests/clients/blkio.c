/*
 * Random reads and writes of 4 KiB through libblkio, 32 at a time; every read is compared with what was written last.
 *
 * usage: blkio DEVICE BYTES REQUESTS
 */
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <blkio.h>

enum { BLOCK = 4096, DEPTH = 32 };

static void check(int result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "%s: %s: %s\n", what, strerror(-result), blkio_get_error_msg());
        exit(1);
    }
}

static uint64_t random_state = 1;

/* splitmix64 */
static uint64_t draw(void)
{
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* Contents of a block after its write number `turn`; 0 means that it was never written. */
static void fill(uint64_t *words, uint64_t block, uint64_t turn)
{
    for (unsigned i = 0; i < BLOCK / 8; i++)
        words[i] = block << 40 ^ turn << 12 ^ i;
}

struct slot {
    bool busy, writes;
    uint64_t block;
};

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    uint64_t blocks = strtoull(argv[2], NULL, 0) / BLOCK, requests = strtoull(argv[3], NULL, 0);
    uint64_t *turns = calloc(blocks, sizeof(*turns));
    bool *busy = calloc(blocks, sizeof(*busy));
    struct slot slots[DEPTH] = { 0 };
    uint64_t expected[BLOCK / 8];

    struct blkio *b;
    check(blkio_create("virtio-blk-vhost-vdpa", &b), "blkio_create");
    check(blkio_set_str(b, "path", argv[1]), "path");
    check(blkio_connect(b), "blkio_connect");
    uint64_t capacity;
    check(blkio_get_uint64(b, "capacity", &capacity), "capacity");
    if (capacity / BLOCK != blocks) {
        fprintf(stderr, "the capacity is %llu\n", (unsigned long long)capacity);
        return 1;
    }
    check(blkio_start(b), "blkio_start");
    struct blkio_mem_region region;
    check(blkio_alloc_mem_region(b, &region, BLOCK * DEPTH), "blkio_alloc_mem_region");
    check(blkio_map_mem_region(b, &region), "blkio_map_mem_region");
    struct blkioq *q = blkio_get_queue(b, 0);
    char *memory = region.addr;

    uint64_t begun = 0, ended = 0;
    while (ended < requests) {
        for (unsigned i = 0; i < DEPTH && begun < requests; i++) {
            uint64_t block = draw() % blocks;
            if (slots[i].busy || busy[block])
                continue;
            /* The contents of a block that was never written are unknown here. */
            slots[i] = (struct slot){ true, turns[block] == 0 || draw() % 2, block };
            busy[block] = true;
            if (slots[i].writes) {
                fill((uint64_t *)(memory + BLOCK * i), block, ++turns[block]);
                blkioq_write(q, block * BLOCK, memory + BLOCK * i, BLOCK, (void *)(uintptr_t)i, 0);
            } else {
                memset(memory + BLOCK * i, 0xa5, BLOCK);
                blkioq_read(q, block * BLOCK, memory + BLOCK * i, BLOCK, (void *)(uintptr_t)i, 0);
            }
            begun++;
        }
        struct blkio_completion done[DEPTH];
        struct timespec timeout = { .tv_sec = 20 };
        int count = blkioq_do_io(q, done, 1, DEPTH, &timeout);
        check(count, "blkioq_do_io");
        for (int n = 0; n < count; n++) {
            unsigned i = (uintptr_t)done[n].user_data;
            check(done[n].ret, "request");
            fill(expected, slots[i].block, turns[slots[i].block]);
            if (!slots[i].writes && memcmp(memory + BLOCK * i, expected, BLOCK)) {
                fprintf(stderr, "wrong data in block %llu\n", (unsigned long long)slots[i].block);
                return 1;
            }
            slots[i].busy = busy[slots[i].block] = false;
            ended++;
        }
    }
    blkio_destroy(&b);
    return 0;
}
