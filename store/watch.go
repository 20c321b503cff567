package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
)

const (
	// confirmInterval is how often etcd is asked again up to where all ranges were sent. etcd ignores the question
	// while one of the watches has not caught up, which it looks after every 100 ms.
	confirmInterval = 50 * time.Millisecond
	// confirmTimeout is how long a change may wait for that. etcd's gRPC proxy never answers; a new list takes the
	// place of the answer.
	confirmTimeout = 2 * time.Second
	// lagInterval is how often it is looked whether a watch still says what there is. One whose member of etcd stands
	// still does not break before the keepalive does, in 13 s.
	lagInterval = 500 * time.Millisecond
	lagTimeout  = time.Second
)

var (
	errWatchClosed  = errors.New("watch ended without a reason")
	errUnconfirmed  = fmt.Errorf("etcd did not confirm a change of several ranges within %v", confirmTimeout)
	errBehind       = fmt.Errorf("the watches are behind etcd and say nothing for %v", lagTimeout)
	errDisconnected = errors.New("connection lost")
)

// session is one list and the watches that follow it, until one of them breaks.
//
// Each range has a watch of its own, and their events come in no order among each other. So that the cache shows one
// revision of etcd, an event waits until every other watch is known to have sent all up to it: by an event of its own,
// or by etcd's answer to the question how far it is (a progress request), which costs one round trip. A cache of one
// range never asks.
type session struct {
	cache  *Cache
	wg     sync.WaitGroup
	msgs   chan message
	states chan bool     // the connection is up
	ask    chan struct{} // capacity 1: ask etcd how far it is

	restores int // of etcd, before the list
	ranges   map[string]*watched
	upTo     int64 // the cache shows this revision
	pending  []event
}

// watched is one range.
type watched struct {
	prefix string
	upTo   int64 // all events up to this revision have come
	cancel context.CancelFunc
}

type message struct {
	from   *watched
	resp   clientv3.WatchResponse
	closed bool
}

type event struct {
	from     *watched
	revision int64
	key      string
	record   *Record // nil: deleted
}

// follow lists and watches until something breaks, and says what.
func (k *Cache) follow(ctx context.Context) error {
	prefixes := k.wanted()
	list, err := k.client.list(ctx, prefixes, 0)
	if err != nil {
		return err
	}
	k.replace(list, prefixes)
	// It is linearizable: a newer revision was that of an etcd that has been restored since, or is shown again.
	k.client.newest.Store(list.revision)
	ctx, cancel := context.WithCancel(ctx)
	s := &session{
		cache: k, restores: list.restores, upTo: list.revision, ranges: map[string]*watched{},
		msgs: make(chan message), states: make(chan bool), ask: make(chan struct{}, 1),
	}
	defer s.wg.Wait()
	defer cancel()
	for _, p := range prefixes {
		s.watch(ctx, p, list.revision)
	}
	s.wg.Go(func() { s.connection(ctx) })
	s.wg.Go(func() { s.questions(ctx) })
	now := k.client.heads.ask()
	if now.restores != list.restores {
		return errRestored
	}
	return s.run(ctx, now.changed)
}

// run follows the watches, until restored is closed at the latest.
func (s *session) run(ctx context.Context, restored <-chan struct{}) error {
	var retry <-chan time.Time // while something is pending
	var since time.Time        // when the oldest pending event came, or the cache last moved on
	lag := time.NewTicker(lagInterval)
	defer lag.Stop()
	var behind time.Time // since when it is, and has not moved on
	for {
		progress := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case m := <-s.msgs:
			if err := s.receive(m); err != nil {
				return err
			}
			progress = true
		case <-s.cache.want:
			if err := s.adjust(ctx); err != nil {
				return err
			}
		case up := <-s.states:
			if up {
				s.cache.contact(nil)
			} else {
				s.cache.contact(errDisconnected)
			}
		case <-restored:
			return errRestored
		case <-lag.C:
			switch {
			case s.cache.client.newest.Load() <= s.upTo || len(s.ranges) == 0:
				behind = time.Time{}
			case behind.IsZero():
				behind = time.Now()
				signal(s.ask) // it may be that only others' records have changed
			case time.Since(behind) >= lagTimeout:
				return errBehind
			default:
				signal(s.ask)
			}
		case <-retry:
			if time.Since(since) > confirmTimeout {
				return errUnconfirmed
			}
			retry, progress = time.After(confirmInterval), true
		}
		moved := s.settle()
		if moved {
			behind = time.Time{}
		}
		if len(s.pending) == 0 {
			retry = nil
			continue
		}
		if retry == nil || moved {
			retry, since = time.After(confirmInterval), time.Now()
		}
		if progress {
			signal(s.ask)
		}
	}
}

// watch starts to watch a range, all of which up to the revision is known.
func (s *session) watch(ctx context.Context, prefix string, revision int64) {
	ctx, cancel := context.WithCancel(ctx)
	w := &watched{prefix: prefix, upTo: revision, cancel: cancel}
	s.ranges[prefix] = w
	k := s.cache
	s.wg.Go(func() {
		defer cancel()
		// The creation is notified because a question that was asked before does not cover this watch.
		opts := append(extent(prefix), clientv3.WithRev(revision+1), clientv3.WithCreatedNotify())
		for resp := range k.client.etcd.Watch(ctx, k.client.key(prefix), opts...) {
			if !s.deliver(ctx, message{from: w, resp: resp}) {
				return
			}
		}
		s.deliver(ctx, message{from: w, closed: true})
	})
}

func (s *session) deliver(ctx context.Context, m message) bool {
	select {
	case s.msgs <- m:
		return true
	case <-ctx.Done():
		return false
	}
}

// receive takes in what a watch says.
func (s *session) receive(m message) error {
	w := m.from
	if s.ranges[w.prefix] != w {
		return nil // no longer wanted
	}
	if m.closed {
		return fmt.Errorf("watching %s: %w", w.prefix, errWatchClosed)
	}
	if err := m.resp.Err(); err != nil {
		return fmt.Errorf("watching %s: %w", w.prefix, err)
	}
	for _, e := range m.resp.Events {
		ev := event{from: w, revision: e.Kv.ModRevision, key: strings.TrimPrefix(string(e.Kv.Key), s.cache.client.prefix)}
		if e.Type == clientv3.EventTypePut {
			r := recordOf(e.Kv)
			ev.record = &r
		}
		s.pending = append(s.pending, ev)
		w.upTo = max(w.upTo, ev.revision)
	}
	if m.resp.IsProgressNotify() {
		w.upTo = max(w.upTo, m.resp.Header.Revision)
	}
	return nil
}

// settle puts into the cache all events up to the revision that every range has reached, and reports whether there is a
// newer one than before.
func (s *session) settle() bool {
	upTo := s.upTo
	first := true
	for _, w := range s.ranges {
		if first || w.upTo < upTo {
			upTo, first = w.upTo, false
		}
	}
	if upTo <= s.upTo {
		return false
	}
	s.upTo = upTo
	s.cache.client.heads.saw(upTo, s.restores)
	var rest []event
	s.cache.update(upTo, s.restores, nil, func(put func(string, *Record)) {
		for _, e := range s.pending {
			if e.revision <= upTo {
				put(e.key, e.record)
			} else {
				rest = append(rest, e)
			}
		}
	})
	s.pending = rest
	return true
}

// adjust makes the wanted ranges those of the session. New ones are read at the revision that the cache shows, so that
// they fit what is there at once; when etcd has forgotten it, all is listed anew.
func (s *session) adjust(ctx context.Context) error {
	k := s.cache
	prefixes := k.wanted()
	wanted := map[string]bool{}
	var added []string
	for _, p := range prefixes {
		if wanted[p] = true; s.ranges[p] == nil {
			added = append(added, p)
		}
	}
	if len(s.ranges) == 0 {
		s.upTo = 0 // nothing to fit: the present revision
	}
	list, err := k.client.list(ctx, added, s.upTo)
	if err != nil {
		return err
	}
	if list.restores != s.restores {
		return errRestored
	}
	s.upTo = list.revision
	for p, w := range s.ranges {
		if !wanted[p] {
			w.cancel()
			delete(s.ranges, p)
		}
	}
	var rest []event
	for _, e := range s.pending {
		if s.ranges[e.from.prefix] == e.from {
			rest = append(rest, e)
		}
	}
	s.pending = rest
	k.update(s.upTo, s.restores, prefixes, func(put func(string, *Record)) {
		for key := range k.records {
			if !covered(prefixes, key) {
				put(key, nil)
			}
		}
		for key, r := range list.records {
			put(key, &r)
		}
	})
	for _, p := range added {
		s.watch(ctx, p, s.upTo)
	}
	return nil
}

// questions sends progress requests to etcd. It is a goroutine of its own because the etcd client makes it wait for a
// connection.
func (s *session) questions(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.ask:
		}
		if ctx.Err() == nil {
			_ = s.cache.client.etcd.RequestProgress(ctx) // run asks again, and gives up in the end
		}
	}
}

// connection reports whether the connection is up. The etcd client sets up its watches again by itself, and says
// nothing of it.
func (s *session) connection(ctx context.Context) {
	conn := s.cache.client.etcd.ActiveConnection()
	for {
		state := conn.GetState()
		select {
		case s.states <- state == connectivity.Ready:
		case <-ctx.Done():
			return
		}
		if state == connectivity.Ready && !s.identify(ctx, conn) {
			return
		}
		if !conn.WaitForStateChange(ctx, state) {
			return
		}
	}
}

// identify reads etcd's cluster id, term and revision on each new connection: the etcd client goes on with its watches
// from where they were, and of an etcd that was restored to a lower revision they would say nothing until it has come
// that far again. It gives up where the connection is lost meanwhile: the next one is asked. false: ctx ended.
func (s *session) identify(ctx context.Context, conn *grpc.ClientConn) bool {
	c := s.cache.client
	for {
		try, cancel := context.WithTimeout(ctx, requestTimeout)
		asked := c.heads.ask()
		// linearizable: not older than what anybody has seen
		resp, err := c.etcd.Get(try, c.prefix, clientv3.WithCountOnly())
		cancel()
		if err == nil {
			// run sees a restore by restored
			if _, err = c.heads.answered(asked, resp.Header); !errors.Is(err, errTerm) {
				return true
			}
		}
		if conn.GetState() != connectivity.Ready {
			return true
		}
		if !sleep(ctx, minBackoff) {
			return false
		}
	}
}
