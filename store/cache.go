package store

import (
	"context"
	"errors"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// A watch that broke is set up anew after 100 ms, so that one hiccup is hardly seen, then later and later up to 2 s,
// which is soon enough for people and spares an etcd that has just come back. Each wait is spread by a half: all agents
// lose etcd together.
const (
	minBackoff = 100 * time.Millisecond
	maxBackoff = 2 * time.Second
)

// Cache holds the records of some key ranges as etcd has them, all at one revision. It is safe for concurrent use.
type Cache struct {
	client *Client
	stream string // distinguishes its watch stream from those of other caches
	ready  chan struct{}
	change chan struct{} // capacity 1
	want   chan struct{} // capacity 1: prefixes were changed

	mu       sync.Mutex // guards what follows
	prefixes []string
	records  map[string]Record
	whole    []string // the ranges of which records has everything
	revision int64
	restores int             // of etcd, before the list
	listed   bool            // ready is closed
	changed  map[string]bool // keys that changed since take; nil: nobody takes
	watching bool
	lost     time.Time // since when it is not watching; zero: it was never lost
	arrived  time.Time // when the first change came since Arrived was called; zero: none has
}

// NewCache returns a cache of the records below the prefixes, which are without the Client's own: OwnerPrefix, or ""
// for everything. One that does not end with a slash is one key, as OwnerKey(ip). It is empty until Run has listed
// them.
func (c *Client) NewCache(prefixes ...string) *Cache {
	return &Cache{
		client: c, prefixes: disjoint(prefixes), records: map[string]Record{},
		// Watches whose contexts carry the same metadata share one stream.
		stream: strconv.FormatInt(c.caches.Add(1), 10),
		ready:  make(chan struct{}), change: make(chan struct{}, 1), want: make(chan struct{}, 1),
	}
}

// Run keeps the cache equal to etcd until ctx ends, and then returns the error of ctx. It lists all ranges at one
// revision and watches from there. When the watch breaks, or etcd has compacted the revision, it lists again and takes
// over what differs, after a pause; the records stay as they were meanwhile. It may run once.
func (k *Cache) Run(ctx context.Context) error {
	defer k.end()
	ctx = metadata.AppendToOutgoingContext(clientv3.WithRequireLeader(ctx), "egret-cache", k.stream)
	for wait := minBackoff; ; wait = min(2*wait, maxBackoff) {
		began := time.Now()
		err := k.follow(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// A compaction is the ordinary life of an etcd whose other users write more than Egret: nothing is lost.
		compacted := errors.Is(err, rpctypes.ErrCompacted)
		if !compacted {
			k.contact(err)
		}
		if time.Since(began) > 2*maxBackoff {
			wait = minBackoff // it worked for a while: this is a new fault
			if compacted {
				continue
			}
		}
		if !sleep(ctx, wait/2+rand.N(wait)) {
			return ctx.Err()
		}
	}
}

// SetPrefixes makes prefixes the ranges of the cache. Records outside of them go, those of new ones come once etcd has
// sent them, all others stay. It does not wait for that.
func (k *Cache) SetPrefixes(prefixes ...string) {
	k.mu.Lock()
	k.prefixes = disjoint(prefixes)
	k.mu.Unlock()
	signal(k.want)
}

// Add adds a range to those of the cache, as SetPrefixes does.
func (k *Cache) Add(prefix string) { k.SetPrefixes(append(k.wanted(), prefix)...) }

// Remove takes out a range that NewCache, SetPrefixes or Add has put in.
func (k *Cache) Remove(prefix string) {
	k.SetPrefixes(slices.DeleteFunc(k.wanted(), func(p string) bool { return p == prefix })...)
}

func (k *Cache) wanted() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.prefixes)
}

// Ready returns a channel that is closed after the first whole list.
func (k *Cache) Ready() <-chan struct{} { return k.ready }

// Changed returns a channel that delivers once whenever records changed since the last receive, and after the first
// whole list. There is one such channel: of several receivers, one gets it.
func (k *Cache) Changed() <-chan struct{} { return k.change }

// Get returns the record of a key.
func (k *Cache) Get(key string) (Record, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r, ok := k.records[key]
	return r, ok
}

// List returns the records below a prefix, sorted by key, all of one revision.
func (k *Cache) List(prefix string) iter.Seq2[string, Record] {
	k.mu.Lock()
	found := map[string]Record{}
	for key, r := range k.records {
		if strings.HasPrefix(key, prefix) {
			found[key] = r
		}
	}
	k.mu.Unlock()
	return func(yield func(string, Record) bool) {
		for _, key := range slices.Sorted(maps.Keys(found)) {
			if !yield(key, found[key]) {
				return
			}
		}
	}
}

// Revision returns the revision of etcd that the records are of; 0: nothing is listed yet.
func (k *Cache) Revision() int64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.revision
}

// Healthy reports whether the cache follows etcd at present, as far as can be known: a connection that died silently is
// found out after up to 13 s.
func (k *Cache) Healthy() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.watching
}

// Restores returns how often etcd had turned out to be another one than before when the records were listed.
func (k *Cache) Restores() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.restores
}

// state is what a Cache is of.
type state struct {
	whole    []string // the ranges of which everything is there
	revision int64
	restores int
}

// take returns the keys that changed since the last take with their records, nil where they are gone. ok is false
// before the first whole list.
func (k *Cache) take() (changed map[string]*Record, is state, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.listed {
		return nil, is, false
	}
	changed = make(map[string]*Record, len(k.changed))
	for key := range k.changed {
		changed[key] = nil
		if r, ok := k.records[key]; ok {
			changed[key] = &r
		}
	}
	clear(k.changed)
	return changed, state{k.whole, k.revision, k.restores}, true
}

// Arrived returns when the first change since the last call came; the zero Time: there was none.
func (k *Cache) Arrived() time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	at := k.arrived
	k.arrived = time.Time{}
	return at
}

// Track makes the cache remember which keys change, for TakeChanged. It is for before Run.
func (k *Cache) Track() { k.changed = map[string]bool{} }

// TakeChanged returns the keys whose records changed since the last call, in no order; all of them the first time.
func (k *Cache) TakeChanged() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	keys := slices.Collect(maps.Keys(k.changed))
	if len(keys) > 0 {
		// one that was cleared keeps the size of the first list, and costs as much to clear each time
		k.changed = map[string]bool{}
	}
	return keys
}

// replace makes the list, which is that of the ranges, all that the cache holds.
func (k *Cache) replace(l list, ranges []string) {
	k.update(l.revision, l.restores, ranges, func(put func(string, *Record)) {
		for key := range k.records {
			if _, ok := l.records[key]; !ok {
				put(key, nil)
			}
		}
		for key, r := range l.records {
			put(key, &r)
		}
	})
}

// update calls fill to put records, nil for those that are gone. After it everything in ranges, nil for those of
// before, is there. It signals when anything changed.
func (k *Cache) update(revision int64, restores int, ranges []string, fill func(put func(string, *Record))) {
	k.mu.Lock()
	defer k.mu.Unlock()
	changed := restores != k.restores || ranges != nil && !slices.Equal(ranges, k.whole)
	if k.restores = restores; ranges != nil {
		k.whole = ranges
	}
	fill(func(key string, r *Record) {
		old, ok := k.records[key]
		switch {
		case r == nil && !ok, r != nil && ok && r.equal(old):
			return
		case r == nil:
			delete(k.records, key)
		default:
			k.records[key] = *r
		}
		changed = true
		if k.changed != nil {
			k.changed[key] = true
		}
	})
	k.revision = revision
	if !k.listed {
		k.listed, changed = true, true
		close(k.ready)
	}
	if changed {
		if k.arrived.IsZero() {
			k.arrived = time.Now()
		}
		signal(k.change)
	}
}

// contact notes whether the watch works (nil) or why not, and logs when that changes.
func (k *Cache) contact(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err == nil && !k.watching:
		k.client.watchLost.Store(false)
		if k.watching = true; !k.lost.IsZero() {
			k.client.log.Info("watch of etcd is back", "rev", k.revision, "dur", time.Since(k.lost))
		}
	case err != nil && (k.watching || k.lost.IsZero()):
		k.watching, k.lost = false, time.Now()
		k.client.watchLost.Store(true)
		k.client.log.Warn("watch of etcd lost, will retry; the records stay as they are", "rev", k.revision, "err", err)
	}
}

// end notes that the watch has ended.
func (k *Cache) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.watching = false
}

// signal wakes the receiver of a channel of capacity 1. It never blocks.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
