/* The init of a guest that finds out whether it was given old memory: round after round it goes over PAGES pages,
 * expects in each the number of the round before, and writes that of this one.  `stale PAGE FOUND ROUND` where it is
 * another; `count N` twenty times a second. */

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { PAGES = 128, SIZE = 4096, NS = 50000000 };

static long long now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(void)
{
    static volatile unsigned long memory[PAGES][SIZE / sizeof(unsigned long)];
    long long told = now();
    unsigned long round, count = 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("ready walk\n");
    for (round = 1;; round++) {
        for (int page = 0; page < PAGES; page++) {
            if (memory[page][0] != round - 1)
                printf("stale %d %lu %lu\n", page, memory[page][0], round);
            memory[page][0] = round;
        }
        if (now() - told >= NS) {
            told = now();
            printf("count %lu\n", ++count);
        }
    }
}
