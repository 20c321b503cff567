package crdsync

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/egret-project/egret/store"
)

const (
	// housekeepingInterval is how often etcd's members are asked for their sizes and alarms.
	housekeepingInterval = 10 * time.Second
	// minDefragment is how much a defragmentation must give back, in bytes: below it is not worth a member that stands
	// still.
	minDefragment = 64 << 20
	// maxAlone is how much of a database may be in use, in bytes, for the only member of etcd to be defragmented: no
	// permit of the agents is renewed meanwhile, and they last 500 ms unless told otherwise. With 8 MB in use etcd said
	// nothing for 0.3 s, with 32 MB for 0.8 s, on two cores with a load of 10 (BenchmarkDefragmentation).
	maxAlone = 8 << 20
	// maxStuck is how often etcd has to be found full, with nothing to give back, until the log calls for a person:
	// members drop history in their own time, and one may raise the alarm again that was just disarmed.
	maxStuck = 3
	// eventLife is how long the API server keeps an Event by default: then it is made again.
	eventLife = time.Hour
	// notifyTimeout bounds how long the next look waits for an API server that does not answer.
	notifyTimeout = 10 * time.Second
)

// housekeeping keeps etcd from filling up. One leader does it; see rescue, and MakeRoom.
type housekeeping struct {
	store        *store.Client
	lead         *store.Leadership // nil: nobody leads
	alone        bool              // there is no leader who may do it
	compactAfter time.Duration     // how long etcd is to know what a key was; 0: that is up to others
	defragment   bool
	interval     time.Duration
	// notify makes Events of what is so since a time, once each however often it is called; nil: there are none.
	notify func(ctx context.Context, n eventText, since time.Time) error
	log    *slog.Logger
	// now is time.Now but where a day is to pass within minutes, beside a real etcd.
	now func() time.Time

	// What follows belongs to the goroutine of run.
	noted   time.Time // when revision and time were noted last
	dropped int64     // the last revision that was compacted
	told    notice    // of the last Events
	fault   string    // what was logged last
	stuck   int       // how often etcd was found full with nothing more to give back
}

// notice is what Events say of etcd's space. The zero notice: nothing yet.
type notice struct {
	eventText
	full  bool
	since time.Time
	made  bool
}

// history is the record of when etcd had which revision: etcd itself does not know how old they are.
type history struct {
	Revisions []moment `json:"revisions"` // oldest first
}

type moment struct {
	Revision int64     `json:"revision"`
	At       time.Time `json:"at"`
}

// before returns the newest revision, none after a limit, that etcd had at a time, 0: none is known.
func (h history) before(t time.Time, limit int64) (revision int64) {
	for _, m := range h.Revisions {
		if !m.At.After(t) && m.Revision <= limit {
			revision = max(revision, m.Revision)
		}
	}
	return revision
}

// with returns the history with one moment more, without what was before a revision that is compacted. What lies in the
// future, by a clock that was wrong or as somebody else wrote it, is left out.
func (h history) with(now moment, compacted int64) history {
	out := history{}
	for _, m := range h.Revisions {
		if m.Revision > compacted && m.Revision < now.Revision && !m.At.After(now.At) {
			out.Revisions = append(out.Revisions, m)
		}
	}
	out.Revisions = append(out.Revisions, now)
	return out
}

// run looks once every interval until ctx ends. Nothing that fails ends it.
func (h *housekeeping) run(ctx context.Context) error {
	tick := time.NewTicker(h.interval)
	defer tick.Stop()
	for {
		err := h.look(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		fault := ""
		if err != nil {
			fault = err.Error()
		}
		if fault != h.fault && fault != "" {
			h.log.Warn("etcd's housekeeping failed, will retry", "err", err)
		}
		h.fault = fault
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// look does what is to be done now.
func (h *housekeeping) look(ctx context.Context) error {
	space, err := h.store.Space(ctx)
	if err != nil {
		return err
	}
	if space.NoSpace {
		err = h.freeSpace(ctx, space)
	}
	if nerr := h.notifyFull(ctx, space); nerr != nil {
		h.log.Warn("making an Event failed, will retry", "err", nerr)
	}
	if space.NoSpace {
		return err
	}
	h.stuck = 0
	if h.lead == nil && !h.alone {
		return nil // somebody else was faster, and what is left is a leader's
	}
	if h.lead != nil && h.compactAfter > 0 && h.now().Sub(h.noted) >= h.compactAfter/12 {
		if err := h.compact(ctx, space.Revision); err != nil {
			return err
		}
		h.noted = h.now()
	}
	if m := worst(space.Members, func(m store.Member) bool { return m.InUse < m.Size/2 && m.Size-m.InUse > minDefragment }); m != nil {
		return h.defragmentOne(ctx, space, *m)
	}
	return nil
}

// compact drops what is older than compactAfter, and notes when etcd had which revision, in etcd: leaders may follow
// each other within the time. Where nothing was written since, nothing is.
func (h *housekeeping) compact(ctx context.Context, revision int64) error {
	records, err := h.store.List(ctx, store.CompactionKey)
	if err != nil {
		return err
	}
	r := records[store.CompactionKey]
	known, err := store.Decode[history](r)
	if err != nil && r.Revision != 0 {
		h.log.Warn("record is faulty, and written anew", "err", fmt.Errorf("%s: %w", store.CompactionKey, err))
	}
	now := h.now()
	old := known.before(now.Add(-h.compactAfter), revision)
	if old > h.dropped {
		done, err := h.store.Compact(ctx, old)
		if err != nil {
			return err
		}
		h.dropped = old
		h.log.Debug("compacted", "rev", old, "by_others", !done)
	}
	if r.Revision == revision {
		return nil
	}
	value, err := store.Encode(known.with(moment{revision, now}, old))
	if err != nil {
		return err
	}
	return h.lead.Commit(ctx, store.Op{Key: store.CompactionKey, Value: value})
}

// worst returns the member that has most to give back, of those that are worth it and do not lead; else the one that
// leads.
func worst(members []store.Member, worth func(store.Member) bool) *store.Member {
	members = slices.DeleteFunc(slices.Clone(members), func(m store.Member) bool { return !worth(m) })
	if len(members) == 0 {
		return nil
	}
	m := slices.MaxFunc(members, func(a, b store.Member) int {
		if a.Leads != b.Leads {
			if a.Leads {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Size-a.InUse, b.Size-b.InUse)
	})
	return &m
}

// defragmentOne defragments a member, when all are well: the others have to answer meanwhile.
func (h *housekeeping) defragmentOne(ctx context.Context, space store.Space, m store.Member) error {
	switch {
	case !h.defragment:
		return nil
	case space.Fault != nil:
		return fmt.Errorf("defragmenting member %s: not all members of etcd are well: %w", m.Name, space.Fault)
	case len(space.Members) == 1 && m.InUse > maxAlone:
		return fmt.Errorf("defragmenting the only member of etcd: %s in use take longer than agents can be without it (%s at most): "+
			"do it by hand, etcdctl defrag", store.Megabytes(m.InUse), store.Megabytes(maxAlone))
	}
	begin := time.Now()
	if err := h.store.Defragment(ctx, m); err != nil {
		return err
	}
	h.log.Info("etcd's member was defragmented", "member", m.Name, "size", store.Megabytes(m.Size), "in_use", store.Megabytes(m.InUse), "dur", time.Since(begin))
	return nil
}

// freeSpace ends the alarm NOSPACE: it drops all history, defragments one member after another, and disarms once each
// is well below its quota.
func (h *housekeeping) freeSpace(ctx context.Context, space store.Space) error {
	if h.compactAfter > 0 {
		if _, err := h.store.Compact(ctx, space.Revision); err != nil {
			return err
		}
	}
	for range space.Members {
		var err error
		if space, err = h.store.Space(ctx); err != nil {
			return err
		}
		m := worst(space.Members, func(m store.Member) bool { return m.Size > sizeToDisarm(m) && m.InUse < m.Size*3/4 })
		if m == nil || !h.defragment {
			break
		}
		if err := h.defragmentOne(ctx, space, *m); err != nil {
			return err
		}
	}
	space, err := h.store.Space(ctx)
	if err != nil {
		return err
	}
	if space.Fault != nil {
		return fmt.Errorf("disarming NOSPACE: not all members of etcd are well: %w", space.Fault)
	}
	for _, m := range space.Members {
		if m.Size > sizeToDisarm(m) {
			if h.stuck++; h.stuck == maxStuck {
				h.log.Error("no room could be made in etcd: a person is needed", "found", m.String())
			}
			return nil
		}
	}
	if err := h.store.Disarm(ctx); err != nil {
		return err
	}
	h.log.Info("etcd has room again, NOSPACE is disarmed")
	return nil
}

// sizeToDisarm is the size of a member below which NOSPACE is disarmed. Where the quota is not known, as of an etcd
// before 3.6, it is taken to be etcd's default: where it is smaller, the alarm comes again with the first change.
func sizeToDisarm(m store.Member) int64 { return cmp.Or(m.Quota, defaultQuota) * 3 / 4 }

const defaultQuota = 2 << 30

// notifyFull makes Events that etcd is full, once and every hour, and that it is not any more.
func (h *housekeeping) notifyFull(ctx context.Context, space store.Space) error {
	switch now := time.Now(); {
	case h.notify == nil, !space.NoSpace && h.told.since.IsZero():
		return nil
	case space.NoSpace != h.told.full, space.NoSpace && now.Sub(h.told.since) >= eventLife:
		h.told = notice{fullText(space), space.NoSpace, now, false}
	case h.told.made:
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, notifyTimeout)
	defer cancel()
	err := h.notify(ctx, h.told.eventText, h.told.since)
	h.told.made = err == nil
	return err
}

// fullText is what Events say of etcd's space.
func fullText(space store.Space) eventText {
	if !space.NoSpace {
		return eventText{corev1.EventTypeNormal, "EtcdHasRoom", "MakeRoom", "etcd was full (NOSPACE), and takes changes again"}
	}
	note := "etcd is full (NOSPACE) and takes no changes: egress IPs stay where they are, no IP gets another node, no new pod is known"
	for _, m := range space.Members {
		note += "; " + m.String()
	}
	return eventText{corev1.EventTypeWarning, "EtcdNoSpace", "MakeRoom", note}
}

// createPoolEvents makes an Event of each pool, unless there is that one.
func (s *status) createPoolEvents(ctx context.Context, n eventText, since time.Time) error {
	var errs []error
	for _, o := range s.source.pools.GetIndexer().List() {
		u := o.(*unstructured.Unstructured)
		about := reference(item{poolKind, u.GetName()}, u.GetUID())
		errs = append(errs, s.recorder.create(ctx, s.recorder.event(about, n, since.UTC().Format(time.RFC3339), 0)))
	}
	return errors.Join(errs...)
}

// rescue frees space while nobody leads: nobody can be elected in an etcd that takes no changes.
func (r *replica) rescue(ctx context.Context) error {
	h := r.housekeeping(nil, nil)
	tick := time.NewTicker(h.interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if !r.Store.NoSpace() {
			continue
		}
		if led, err := r.Store.Led(ctx); err != nil || led {
			continue // it is asked again soon, and the leader's to do
		}
		if err := h.look(ctx); err != nil && ctx.Err() == nil {
			h.log.Warn("etcd's housekeeping failed, will retry", "err", err)
		}
	}
}

// MakeRoom defragments members of etcd, one at a time, and makes room in a full etcd, until ctx ends: what crdsync does
// itself where etcd has no users, or crdsync the role root. It is for an etcd that compacts itself; of a full one it
// drops all history. One at a time may run it.
func MakeRoom(ctx context.Context, s *store.Client, log *slog.Logger) {
	h := &housekeeping{store: s, alone: true, compactAfter: time.Hour, defragment: true, log: log, interval: housekeepingInterval, now: time.Now}
	_ = h.run(ctx) // nothing but the end of ctx ends it
}

func (r *replica) housekeeping(lead *store.Leadership, notify func(context.Context, eventText, time.Time) error) *housekeeping {
	return &housekeeping{
		store: r.Store, lead: lead, compactAfter: r.CompactAfter, defragment: r.Defragment, notify: notify, log: r.Log,
		interval: cmp.Or(r.HousekeepingInterval, housekeepingInterval), now: time.Now,
	}
}
