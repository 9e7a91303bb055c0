/*
 * The two-phase move of link.md, for the model checker spin.  Postcopy is left out, and so is a guest that is paused,
 * and a second move of the same guest.
 *
 *     spin -a link.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan -m10000
 *
 * goes through every order of events: each of the five processes may be killed once at any moment, the link may end at
 * any moment and lose what was under way (never a piece out of the middle), `--recover` runs on both sides, as often as
 * it likes and itself killed between any two steps, and a time-out, a signal or damage is a command that just gives up.
 * At any moment either guest may be reset, or shut itself down where it runs, and a stranger without the secret of
 * the migration may open any conversation with either side, answer in the place of either, or send a guest of his own.
 *
 * What must hold stands as assertions where it could break:
 *   1  the guest never runs on both QEMUs, nor from a copy older than what it has done since: source_runs, guest_runs
 *   2  from every state in which all has come to rest, `--recover` on one side makes it run on exactly one, and
 *      `vm-cont --force` is needed only where a QEMU was killed; no command ends the last whole copy: `rest`, ends_copy
 *   3  before SHUT nothing but the death of its QEMU keeps the guest from running on at the source: `rest`
 *   4  status 0 means it runs over there, status 1 that it runs here, unless that QEMU was killed then: source_ends
 *   5  a stranger hears nothing of the guest: `stranger`
 * A process that stands still for ever is an invalid end state, which spin reports by itself.
 *
 * Each name in an #ifdef is a mistake: with -DNAME for spin an assertion must fail (tests/unit/migrate/test_link_model.py), and
 * `spin -DNAME -t -p link.pml` then tells the story.
 */

mtype = { hello, accept, refuse, data, all_sent, loaded, go, running, cancel };    /* frames; all_sent: `end` */
mtype = { Here, Sending, Undecided, Given, Granted };                              /* the source QEMU */
mtype = { Waiting, Loading, Loaded, Reset, Running };        /* the destination QEMU; Reset: held, its memory lost */
mtype = { Foreign };                                         /* the same: a stranger has sent a guest of his own */
mtype = { Gone, Unasked, Refused };                          /* either; not known; what is told to a stranger */

chan there = [4] of { mtype };
chan back = [3] of { mtype };

mtype source = Here;
mtype destination = Waiting;
bool shut;                       /* SHUT is in the socket of the source QEMU */
bool source_closed;              /* the source's end of that socket is closed */
bool fed;                        /* all data are in the socket of the destination QEMU */
bool receiver_closed;            /* the receiver's end of that socket is closed */
bool taken;                      /* the mark in the destination QEMU */
bool arrived;                    /* the same */
bool reset_here;                 /* given away, and reset since: its run state is `prelaunch` */
bool busy;                       /* the source talks to the monitor of the source QEMU: nobody else does */
bool cut;                        /* the link has ended */
bool kill_source, kill_receiver; /* kill -9 is under way */
bool source_ended, receiver_ended;
bool settles_here, settles_there; /* a --recover is under way */
bool quiet;                      /* no more crashes, and nobody begins to settle */

/* What only the observer knows. */
bool again;                      /* the guest ran on at the source after it was sent: a copy of it is old */
bool ran;                        /* it has run at the destination */
bool over;                       /* it has shut down */
bool source_killed, destination_killed;

#define source_may_run (source == Here || source == Sending)
#define nobody_talks (!busy || source == Gone)
#define link_over(c) (cut && empty(c))
/* To hello(settle): the mark is believed. */
#define answer (destination == Loaded && arrived -> Running : destination)

/* What is told to one who has shown the secret, or has not. */
#ifndef SETTLE_TO_ANYBODY
#define told_there(shown) (shown -> answer : Refused)
#else
#define told_there(shown) answer
#endif
#ifndef GRANT_TO_ANYBODY
#define told_here(shown) (shown -> source : Refused)
#else
#define told_here(shown) source
#endif

inline send(c, frame) {
    atomic {
        if
        :: cut                                      /* nobody hears it */
        :: !cut -> c ! frame
        fi
    }
}

/* Keep the first frames that are under way, lose the others. */
inline lose_some(c) {
    left = len(c);
    keep = true;
    do
    :: left > 0 ->
        c ? frame;
        if
        :: keep -> c ! frame
        :: keep = false
        :: !keep
        fi;
        left--
    :: left == 0 -> break
    od;
    frame = 0
}

inline end_link() {
    atomic {
        if
        :: cut
        :: !cut ->
            cut = true;
            lose_some(there);
            lose_some(back)
        fi;
        keep = false
    }
}

/* It runs at the source (again). */
inline source_runs() {
    assert(destination != Running);
    assert(!ran && !over);
    source = Here;
    again = true;
    reset_here = false
}

/* It runs at the destination.  Inside of an atomic. */
inline guest_runs() {
    assert(destination == Loaded || destination == Reset || destination == Loading);
    assert(source == Granted || source == Gone);
    assert(!again);
    assert(!over);
    destination = Running;
    ran = true
}

/* A command ends the destination QEMU, or its user as advised: never with the last whole copy in it. */
inline ends_copy() {
    if
    :: destination == Gone
    :: destination != Gone ->
        assert(destination != Running);
        assert(destination != Loaded || source != Gone || again);
        destination = Gone
    fi
}

/* `cont` there; `done` says whether it runs. */
inline let_it_run(done) {
    atomic {
        if
        :: destination == Loaded || destination == Reset ->     /* who lets it run does not look: it boots then */
            if
            :: guest_runs(); done = true
            :: !quiet                               /* refused: another has a lock on the disk */
            fi
        :: destination == Running -> done = true
        :: else
        fi
    }
}

/* Look and act in one conversation with the monitor of the source QEMU. */
inline take_back() {
    assert(source != Granted);
    source_runs()
}

/* The same.  A mark on one that runs does not stop it. */
inline grant() {
    source = (source == Given -> Granted : source)
}

/* Property 4. */
inline source_ends(status) {
    atomic {
        assert(status != 0 || ran);
        assert(status != 1 || source_may_run || source_killed || over)
    }
}

active proctype source_qemu() {
end:
    do
    :: atomic { source == Sending -> source = Undecided }       /* everything is sent; it stands still */
    :: atomic { source == Undecided && shut -> source = Given }
    :: atomic { (source == Sending || source == Undecided) && source_closed && !shut ->
#ifndef STAYS_STOPPED
        source_runs()
#else
        source = Given
#endif
    }
    od
}

active proctype destination_qemu() {
end:
    do
    :: atomic { destination == Loading && fed ->
#ifndef RUNS_WHEN_LOADED
        destination = Loaded
#else
        guest_runs()
#endif
    }
    :: atomic { destination == Loading && !fed && receiver_closed -> destination = Gone }
    od
}

active proctype vm_migrate() {
    mtype frame, seen;
    bool keep, sent, done;
    byte left;
    {
        send(there, hello);
        if
        :: back ? accept
        :: back ? refuse -> goto unchanged
        :: link_over(back) -> goto unchanged
        :: goto unchanged                           /* a time-out, a signal */
        fi;
        atomic {
            if
            :: source == Here -> source = Sending   /* and marked before */
            :: source == Gone -> goto unchanged
            fi
        }
        if
        :: source == Undecided
        :: source == Here || source == Gone -> goto gives_up
        :: link_over(back) -> goto gives_up
        :: goto gives_up
        fi;
        sent = true;
        send(there, data);
        send(there, all_sent);
        if
        :: back ? loaded
        :: source == Here || source == Gone -> goto gives_up
        :: link_over(back) -> goto gives_up
        :: goto gives_up
        fi;
        atomic {
            if
            :: source == Undecided -> shut = true
            :: source != Undecided -> goto gives_up /* it closed the socket: cancelled, or killed */
            fi
        }
#ifdef GO_BEFORE_GRANT
        send(there, go);
#endif
        source != Undecided;
        /* Look and act are one conversation; only a death of the QEMU comes between. */
#ifndef TORN_GRANT
        atomic { nobody_talks -> busy = true; seen = source }
#else
        seen = source;
#endif
        if
        :: seen == Given ->                         /* all is well: grant */
            atomic {
                if
                :: source == Gone                   /* it stood still up to its end: the other is the only one */
                :: source != Gone -> grant()
                fi;
                busy = false
            };
            goto granted
#ifndef ENDS_GIVEN
        :: seen == Given ->                         /* the link is lost, or a signal came */
            atomic {
                if
                :: source == Gone -> busy = false; goto granted
                :: source != Gone -> take_back(); busy = false; goto gives_up
                fi
            }
#else
        :: seen == Given -> busy = false; source_ends(1); goto ends
#endif
        :: seen == Granted -> busy = false; goto granted    /* to one who asked for it */
        :: seen == Here -> busy = false; goto gives_up      /* cancelled before it read SHUT, or taken back */
        :: seen == Gone -> busy = false;
#ifndef GOES_WHEREVER_GONE
            goto ends                               /* may have run in between: status 5 */
#else
            goto granted
#endif
        fi;

granted:
        seen = 0;
        send(there, go);
#ifdef ZERO_AFTER_GO
        source_ends(0);
        goto ends;
#endif
        if
        :: back ? running -> source_ends(0); goto ends
        :: link_over(back)
        :: skip                                     /* for too long nothing was heard */
        fi;
        do                                          /* settle, over a new link; what a stranger answers is no proof */
        :: answer == Loaded -> let_it_run(done);
            if
            :: done -> source_ends(0); goto ends
            :: done -> done = false                 /* `running` was lost */
            :: !done
            fi
        :: answer == Running -> source_ends(0); goto ends
#ifdef BELIEVES_WHO_HAS_IT
        :: source_ends(0); goto ends                /* a stranger says that it runs */
#endif
        :: goto ends                                /* status 5 */
        od;

gives_up:
        seen = 0;
        source_closed = true;
#ifndef BLIND_CANCEL
        if
        :: source == Here ->                        /* seen: it does run on */
            send(there, cancel);
            source_ends(1)
        :: source == Gone && !sent -> source_ends(1)
        :: source == Gone && sent                   /* a whole copy may be there: silent, status 5 */
        fi;
#else
        send(there, cancel);
        (source == Here || source == Gone) -> source_ends(1);
#endif
        goto ends;

unchanged:
        source_ends(1);
ends:
        skip
    } unless { atomic { kill_source -> kill_source = false } };
    atomic {
        seen = 0; sent = false; done = false; busy = false;
        source_closed = true;
        end_link();
        source_ended = true
    }
}

active proctype vm_restore() {
    mtype frame;
    bool keep, done;
    byte left;
    {
        if
        :: there ? hello
        :: link_over(there) -> goto ends
        fi;
        atomic {
            if
            :: destination == Waiting ->            /* claimed; marked and held before the first byte */
                destination = Loading;
#ifndef LATE_MARK
                taken = true;
#endif
                send(back, accept)
            :: send(back, refuse); goto ends        /* it does not fit, or is gone */
            fi
        }
#ifdef LOADED_AT_ONCE
        send(back, loaded);
#endif
        do
        :: there ? data -> fed = true
        :: there ? all_sent -> break
        :: there ? cancel -> goto cancelled
        :: link_over(there) -> goto broken
        :: destination == Gone -> goto ends
        :: goto broken                              /* damage, a signal */
#ifdef LOADED_AT_ONCE
        :: there ? go -> goto lets_it_run
#endif
        od;
        if
        :: destination == Loaded || destination == Reset || destination == Running
        :: destination == Gone -> goto ends
        :: goto broken
        fi;
#ifdef LATE_MARK
        taken = true;
#endif
        send(back, loaded);
        if
        :: there ? go
        :: there ? cancel -> goto cancelled
#ifndef DEAF
        :: link_over(there) ->
#ifdef ENDS_HELD
            atomic { ends_copy() };
#endif
            goto ends                               /* left held, for it may be granted: status 5 */
#endif
        :: destination == Gone -> goto ends
        fi;

lets_it_run:
#ifdef ARRIVED_FIRST
        arrived = true;
#endif
        let_it_run(done);
        if
        :: done -> arrived = true; send(back, running)
        :: !done                                    /* refused: left held, status 5 */
        fi;
        goto ends;

broken:
        /* Only the socket is closed: of that QEMU ends, unless it had everything.  Then it is left held. */
#ifdef ENDS_WHEN_BROKEN
        atomic { ends_copy() };
#endif
        goto ends;

cancelled:
        atomic { ends_copy() };
ends:
        skip
    } unless { atomic { kill_receiver -> kill_receiver = false } };
    atomic {
        done = false;
        receiver_closed = true;
        end_link();
        receiver_ended = true
    }
}

/* vm-migrate --recover on the source's side, with or without a way to the other. */
active proctype settle_source() {
    mtype other = Unasked;
    bool done;
end:
    do
    :: atomic { !quiet && (source == Given || source == Granted) -> settles_here = true; other = Unasked };
        if
        :: other = told_there(true)                 /* to hello(settle) */
        :: skip                                     /* no URI, or not reached, or a stranger answers */
        fi;
        if
#ifndef TORN_TAKE_BACK
        :: atomic { nobody_talks && source == Given && other != Loaded -> take_back() }
#else
        :: atomic { nobody_talks && source == Given && other != Loaded };
            atomic { nobody_talks && source != Gone -> source_runs() }
#endif
        :: atomic { nobody_talks && source == Given && other == Loaded -> grant() };
            let_it_run(done)
        :: source == Granted && other == Loaded -> let_it_run(done)
#ifdef TAKES_BACK_ENDED
        :: atomic { nobody_talks && source == Granted && other == Gone -> source_runs() }
#endif
#ifdef TAKES_BACK_GRANTED
        :: atomic { nobody_talks && source == Granted && other == Unasked -> source_runs() }
#endif
        :: skip                                     /* nothing to do, status 5; or killed, or the link is lost */
        fi;
        atomic { done = false; other = Unasked; settles_here = false }
    od
}

/* vm-migrate --recover on the destination's side. */
active proctype settle_destination() {
    mtype other = Unasked;
    bool done;
end:
    do
    :: atomic { !quiet && receiver_ended && destination == Loaded && taken -> settles_there = true };
        if                                          /* hello(grant), and the answer */
        :: atomic { nobody_talks ->
                if
                :: source == Given -> grant()
                :: source != Given
                fi;
                other = told_here(true);
#ifdef RESET_IS_HERE
                other = (reset_here -> Here : other)
#endif
            }
#ifdef BELIEVES_WHO_GRANTS
        :: other = Granted                          /* a stranger says so */
#endif
        :: skip                                     /* not reached, the answer is lost, or a stranger gives it */
        fi;
        if
        :: other == Granted -> let_it_run(done)
#ifndef UNDECIDED_IS_HERE
        :: atomic { other == Here && destination == Loaded -> ends_copy() } /* the user does what is advised */
#else
        :: atomic { (other == Here || other == Undecided) && destination == Loaded -> ends_copy() }
#endif
        /* Gone, or a QEMU that knows nothing of this move: it may have run on, or have been the last; status 5 */
#ifdef RUNS_WHEN_GONE
        :: other == Gone -> let_it_run(done)
#endif
#ifdef STRANGER_IS_HERE
        :: atomic { other == Gone && destination == Loaded -> ends_copy() }
#endif
        :: skip
        fi;
        atomic { done = false; other = Unasked; settles_there = false }
    od
}

/* Somebody without the secret.  What he asks is answered by `vm-restore --receive` on either side. */
active proctype stranger() {
    mtype heard = Refused;
    bool done;
end:
    do
    /* hello(settle), and go without the answer to it */
    :: atomic { !quiet -> heard = told_there(false); assert(heard == Refused) }
#ifdef GO_FROM_ANYBODY
    :: !quiet -> let_it_run(done); done = false
#endif
    /* hello(grant) */
    :: atomic { !quiet && nobody_talks -> heard = told_here(false); assert(heard == Refused) }
    /* hello(move), or a vm-restore of anybody: the first one has claimed the QEMU, the second leaves it as it is */
    :: atomic { !quiet && destination == Waiting -> destination = Foreign }
    :: atomic { !quiet && destination == Loading ->
#ifndef SECOND_RESTORE_WIPES
        skip
#else
        taken = false
#endif
    }
#ifdef CANCEL_OF_ANYBODY
    :: atomic { !quiet && destination == Loaded -> ends_copy() }
#endif
    od
}

/* Every crash, once each, and what a user may type meanwhile. */
active proctype world() {
    mtype frame;
    bool keep, shot_source, shot_receiver;
    byte left;
    do
    :: atomic { !shot_source && !source_ended -> shot_source = true; kill_source = true }
    :: atomic { !shot_receiver && !receiver_ended -> shot_receiver = true; kill_receiver = true }
    :: atomic { !cut -> end_link() }
    :: atomic { source != Gone -> source = Gone; source_killed = true }
    :: atomic { destination != Gone -> destination = Gone; destination_killed = true }
    /* vm-cancel */
    :: atomic { source == Sending || source == Undecided -> source_runs() }
    /* vm-cont --force, of one who knows; without the mark a plain vm-cont does it as well, of anyone */
    :: atomic { source == Granted && destination == Gone && !ran -> source_runs() }
    :: atomic { destination == Loaded && (!taken || (source == Gone && !again)) -> guest_runs() }
    /* the guest shuts down, and its QEMU ends */
    :: atomic { source_may_run -> source = Gone; over = true }
    :: atomic { destination == Running -> destination = Gone; over = true }
    /* system_reset; the marks count in any run state */
    :: atomic { source == Given || source == Granted -> reset_here = true }
    :: atomic { destination == Loaded -> destination = Reset }
#ifdef RESET_FREES_SOURCE
    :: atomic { reset_here && (source == Given || source == Granted) -> source_runs() }
#endif
#ifdef RESET_FREES_DESTINATION
    :: atomic { destination == Reset -> guest_runs() }
#endif
    :: atomic { quiet = true; shot_source = false; shot_receiver = false; break }
    od
}

/* When all has come to rest: what the table of link.md promises, over a link that works. */
active proctype rest() {
    bool done;
    atomic {
        quiet && source_ended && receiver_ended && !settles_here && !settles_there &&
            source != Sending && source != Undecided && destination != Loading;
        assert(shut || source_may_run || source_killed || over);                            /* property 3 */

        /* On either side alone.  On the destination's it takes a guest that was loaded. */
        if
        :: source == Given && destination == Loaded -> grant(); let_it_run(done)
        :: source == Given && destination != Loaded -> take_back()
        :: source == Granted && destination == Loaded && !arrived -> let_it_run(done)
        :: source == Granted && arrived
        :: destination == Loaded && taken && source == Given -> grant(); let_it_run(done)
        :: destination == Loaded && taken && source == Granted -> let_it_run(done)
        :: destination == Loaded && taken && source == Here -> ends_copy()
        :: else
        fi;

        /* status 5, and the way out */
        if
        :: source == Granted && destination == Gone && !ran -> assert(destination_killed); source_runs()
        :: source == Granted && destination == Reset -> ends_copy(); source_runs()
        :: source == Gone && destination == Loaded && !again -> assert(source_killed); guest_runs()
        :: else
        fi;
        /* One runs, or the QEMU was killed that alone had the guest as it was then. */
        assert((source == Here) != (destination == Running) ||
            (over && source != Here && destination != Running) ||
            (source == Gone && source_killed && (destination != Loaded || again)) ||
            (source == Granted && destination == Gone && destination_killed && ran))
    }
}
