package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/internal/syncbuf"
)

// tracked returns a running cache that tells which keys changed, listed already.
func tracked(t *testing.T, c *Client, prefixes ...string) *Cache {
	t.Helper()
	k := c.NewCache(prefixes...)
	k.changed = map[string]bool{}
	background(t, k.Run)
	recv(t, "the first list", k.Ready())
	return k
}

func took(k *Cache) []string {
	changed, _, _ := k.take()
	return slices.Sorted(maps.Keys(changed))
}

func TestCacheListsItsRangesAndFollowsThem(t *testing.T) {
	c := dial(t, start(t))
	put(t, c, "owners/10.0.0.2", "a")
	put(t, c, "owners/10.0.0.1", "b")
	rev := put(t, c, "pins/10.0.0.1", "not watched")
	k := tracked(t, c, OwnerPrefix, MovePrefix)
	recv(t, "the change that the first list is", k.Changed())
	if k.Revision() != rev {
		t.Errorf("revision %d, want %d", k.Revision(), rev)
	}
	var keys []string
	for key := range k.List(OwnerPrefix) {
		keys = append(keys, key)
	}
	if want := []string{"owners/10.0.0.1", "owners/10.0.0.2"}; !slices.Equal(keys, want) {
		t.Errorf("got %v, want %v", keys, want)
	}
	if _, ok := k.Get("pins/10.0.0.1"); ok {
		t.Error("holds a key outside of its ranges")
	}
	rev = put(t, c, "moves/10.0.0.1", "m")
	until(t, "the move", k.Changed(), func() bool { return value(k, "moves/10.0.0.1") == "m" })
	if r, _ := k.Get("moves/10.0.0.1"); r.Revision != rev || k.Revision() < rev {
		t.Errorf("record of revision %d, cache of %d, want %d", r.Revision, k.Revision(), rev)
	}
	del(t, c, "owners/10.0.0.2")
	until(t, "the release", k.Changed(), func() bool { return value(k, "owners/10.0.0.2") == "" })
	if _, ok := k.Get("owners/10.0.0.2"); ok || !k.Healthy() {
		t.Errorf("deleted key is there: %t; healthy: %t", ok, k.Healthy())
	}
}

// An agent that saw the end of a move before the change of owner would take the IP back, and two nodes would answer for
// it.
func TestWhatOneTransactionChangedIsSeenTogether(t *testing.T) {
	c := dial(t, start(t))
	const keys = "owners/1 moves/1 agents/1"
	write := func(n int) {
		var ops []clientv3.Op
		for key := range strings.FieldsSeq(keys) {
			ops = append(ops, clientv3.OpPut(c.key(key), strconv.Itoa(n)))
		}
		if _, err := c.etcd.Txn(t.Context()).Then(ops...).Commit(); err != nil {
			t.Error(err)
		}
	}
	write(0)
	k := tracked(t, c, OwnerPrefix, MovePrefix, AgentPrefix)
	const last = 300
	written := make(chan struct{})
	go func() {
		defer close(written)
		for n := range last {
			write(n + 1)
		}
	}()
	seen := 0
	until(t, "the last transaction", k.Changed(), func() bool {
		seen++
		if seen%10 == 0 { // a new range must not let the others run ahead
			k.Add(fmt.Sprintf("pins/%d", seen))
		}
		values := map[string]bool{}
		for _, r := range k.List("") {
			values[string(r.Value)] = true
		}
		if len(values) != 1 {
			t.Fatalf("half of a transaction: %v", slices.Sorted(maps.Keys(values)))
		}
		return values[strconv.Itoa(last)]
	})
	<-written // the answer may come after the event
	t.Logf("%d transactions seen in %d steps", last, seen)
}

func TestAfterCompactionOnlyWhatDiffersIsReported(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	for _, key := range []string{"kept", "changed", "deleted"} {
		put(t, c, "owners/"+key, "old")
	}
	k := tracked(t, c, OwnerPrefix, MovePrefix)
	took(k)
	s.Cut()
	direct := &Client{etcd: s.Client(), prefix: DefaultPrefix}
	put(t, direct, "owners/changed", "new")
	del(t, direct, "owners/deleted")
	put(t, direct, "owners/added", "new")
	s.Compact()
	if got := value(k, "owners/deleted"); got != "old" {
		t.Errorf("while cut off: %q, want the old value", got)
	}
	s.Mend()
	until(t, "the new list", k.Changed(), func() bool { return value(k, "owners/changed") == "new" })
	want := []string{"owners/added", "owners/changed", "owners/deleted"}
	if diff := cmp.Diff(want, took(k)); diff != "" {
		t.Errorf("changed keys (-want +got):\n%s", diff)
	}
	put(t, c, "moves/1", "new")
	until(t, "a change after it", k.Changed(), func() bool { return value(k, "moves/1") == "new" })
	if diff := cmp.Diff([]string{"moves/1"}, took(k)); diff != "" {
		t.Errorf("changed keys (-want +got):\n%s", diff)
	}
}

// The etcd client goes on with its watches where they were. An etcd that was restored is behind that, and they would
// say nothing of what changes until it has come as far.
func TestARestoredEtcdIsListedAnew(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	put(t, c, "owners/kept", "old")
	put(t, c, "owners/changed", "old")
	restore := s.Backup()
	k := tracked(t, c, OwnerPrefix)
	for range 20 {
		put(t, c, "owners/changed", "new")
	}
	put(t, c, "owners/added", "new")
	until(t, "the changes", k.Changed(), func() bool { return value(k, "owners/added") == "new" })
	took(k)
	restore()
	until(t, "what was restored", k.Changed(), func() bool { return value(k, "owners/changed") == "old" && value(k, "owners/added") == "" })
	if k.Restores() != 1 {
		t.Errorf("etcd was restored %d times, says the cache", k.Restores())
	}
	if diff := cmp.Diff([]string{"owners/added", "owners/changed"}, took(k)); diff != "" {
		t.Errorf("changed keys (-want +got):\n%s", diff)
	}
	put(t, c, "owners/later", "new")
	until(t, "a change after it", k.Changed(), func() bool { return value(k, "owners/later") == "new" })
}

// Renewals of a lease had brought a revision that the etcd that was restored does not have yet.
func TestARestoredEtcdIsListedOnceWhileItIsBehind(t *testing.T) {
	var log syncbuf.Buffer
	s := start(t)
	c := dialLogging(t, s, slog.New(slog.NewTextHandler(&log, nil)))
	put(t, c, "owners/changed", "old")
	l := grant(t, c, time.Minute)
	restore := s.Backup()
	for range 1000 {
		put(t, c, "owners/changed", "new")
	}
	if err := l.Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	k := tracked(t, c, OwnerPrefix)
	until(t, "the change", k.Changed(), func() bool { return value(k, "owners/changed") == "new" })
	restore()
	until(t, "what was restored", k.Changed(), func() bool { return value(k, "owners/changed") == "old" })
	for !k.Healthy() {
		if !sleep(t.Context(), 10*time.Millisecond) {
			t.Fatal("not watched again")
		}
	}
	lost := func() int { return strings.Count(log.String(), "watch of etcd lost") } // it is listed after that
	before := lost()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err := l.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := lost(); n != before || !k.Healthy() {
		t.Errorf("listed %d times more, healthy %t: %s", n-before, k.Healthy(), &log)
	}
}

func TestAnotherEtcdIsKnownByItsAnswers(t *testing.T) {
	head := func(cluster, term uint64, revision int64) *pb.ResponseHeader {
		return &pb.ResponseHeader{ClusterId: cluster, RaftTerm: term, Revision: revision}
	}
	for _, tt := range []struct {
		name     string
		was, now *pb.ResponseHeader
		another  bool
	}{
		{"the first", nil, head(1, 2, 10), false},
		{"the same, with another leader", head(1, 2, 10), head(1, 3, 12), false},
		{"the same, that had nothing to do", head(1, 2, 10), head(1, 2, 10), false},
		{"restored, and behind", head(1, 2, 10), head(1, 2, 9), true},
		{"restored, and ahead by now, a while later", head(1, 5, 10), head(1, 2, 20), true},
		{"restored, with a higher revision", head(1, 2, 10), head(1, 2, 1_000_000_009), true},
		{"another cluster", head(1, 2, 10), head(7, 2, 20), true},
	} {
		var h heads
		if tt.was != nil {
			if _, err := h.answered(h.ask(), tt.was); err != nil {
				t.Fatal(err)
			}
		}
		h.at = h.at.Add(-termsDiffer)
		early, asked := h.ask(), h.ask()
		restores, err := h.answered(asked, tt.now)
		if tt.another != (restores == 1) || tt.another != (err != nil) {
			t.Errorf("%s: restores %d, %v", tt.name, restores, err)
		}
		select {
		case <-asked.changed:
			if !tt.another {
				t.Errorf("%s: it is said to have changed", tt.name)
			}
		default:
			if tt.another {
				t.Errorf("%s: nobody is told", tt.name)
			}
		}
		// A second answer that was asked for before that is of who knows which.
		if again, err := h.answered(early, tt.now); again != 0 || tt.another != (err != nil) {
			t.Errorf("%s: a second answer: restores %d, %v", tt.name, again, err)
		}
		if later, err := h.answered(h.ask(), tt.now); later != restores || err != nil {
			t.Errorf("%s: a later answer: restores %d, %v", tt.name, later, err)
		}
	}
}

// Events of a watch count too: etcd may have answered nothing since.
func TestAnEtcdThatIsBehindItsEventsIsAnother(t *testing.T) {
	var h heads
	is := &pb.ResponseHeader{ClusterId: 1, RaftTerm: 2, Revision: 10}
	if _, err := h.answered(h.ask(), is); err != nil {
		t.Fatal(err)
	}
	h.saw(99, 1) // of another etcd
	h.saw(11, 0)
	if restores, err := h.answered(h.ask(), is); restores != 1 || err == nil {
		t.Errorf("restores %d, %v", restores, err)
	}
}

func TestRecordsStayWhileEtcdIsDownAndTheLogSaysSoOnce(t *testing.T) {
	log := make(lines, 100)
	s := start(t)
	c := dialLogging(t, s, log.logger())
	put(t, c, "owners/1", "a")
	k := tracked(t, c, OwnerPrefix, MovePrefix)
	put(t, c, "owners/1", "b")
	until(t, "a change", k.Changed(), func() bool { return value(k, "owners/1") == "b" })
	s.Stop()
	if line := recv(t, "a warning", log); !strings.Contains(line, "level=WARN msg=\"watch of etcd lost") {
		t.Errorf("got %s", line)
	}
	if k.Healthy() || value(k, "owners/1") != "b" {
		t.Errorf("healthy: %t, value %q", k.Healthy(), value(k, "owners/1"))
	}
	s.Start()
	if line := recv(t, "the all-clear", log); !strings.Contains(line, "level=INFO msg=\"watch of etcd is back") {
		t.Errorf("got %s", line)
	}
	put(t, c, "moves/1", "new")
	until(t, "a change after it", k.Changed(), func() bool { return value(k, "moves/1") == "new" })
	if !k.Healthy() || len(log) > 0 {
		t.Errorf("healthy: %t; more lines: %d", k.Healthy(), len(log))
	}
}

// watcher stands between a cache and etcd's client. It counts, and can leave etcd unasked.
type watcher struct {
	clientv3.Watcher
	watches, questions atomic.Int64
	mute               bool
}

func (w *watcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	w.watches.Add(1)
	return w.Watcher.Watch(ctx, key, opts...)
}

func (w *watcher) RequestProgress(ctx context.Context) error {
	if w.questions.Add(1); w.mute {
		return nil
	}
	return w.Watcher.RequestProgress(ctx)
}

func intercept(c *Client, mute bool) *watcher {
	w := &watcher{Watcher: c.etcd.Watcher, mute: mute}
	c.etcd.Watcher = w
	return w
}

func TestClosedWatchChannelIsNoDataAndDoesNotSpin(t *testing.T) {
	c := dial(t, start(t))
	w := intercept(c, false)
	if err := w.Close(); err != nil { // every watch from now on is a closed channel
		t.Fatal(err)
	}
	put(t, c, "owners/1", "a")
	k := tracked(t, c, OwnerPrefix)
	began := time.Now()
	for n := range 3 {
		v := strconv.Itoa(n)
		put(t, c, "owners/1", v)
		until(t, "the value of another list", k.Changed(), func() bool { return value(k, "owners/1") == v })
	}
	if n, most := w.watches.Load(), 3+int64(time.Since(began)/(minBackoff/2)); n < 3 || n > most {
		t.Errorf("%d watches in %v, want 3 to %d", n, time.Since(began), most)
	}
}

// etcd's gRPC proxy is such an etcd.
func TestWithoutProgressAnswersAChangeComesWithAnotherList(t *testing.T) {
	c := dial(t, start(t))
	intercept(c, true)
	k := tracked(t, c, OwnerPrefix, MovePrefix)
	put(t, c, "owners/1", "a")
	until(t, "the change", k.Changed(), func() bool { return value(k, "owners/1") == "a" })
}

func TestCacheOfOneRangeAsksNothing(t *testing.T) {
	c := dial(t, start(t))
	w := intercept(c, false)
	k := tracked(t, c, OwnerPrefix)
	put(t, c, "owners/1", "a")
	until(t, "the change", k.Changed(), func() bool { return value(k, "owners/1") == "a" })
	if n := w.questions.Load(); n != 0 {
		t.Errorf("asked %d times", n)
	}
}

func TestRangesComeAndGoWhileTheCacheRuns(t *testing.T) {
	c := dial(t, start(t))
	for _, key := range []string{"owners/1", "pins/1", "pins/2", "moves/1"} {
		put(t, c, key, "a")
	}
	k := tracked(t, c)
	keys := func() string {
		var out []string
		for key := range k.List("") {
			out = append(out, key)
		}
		return strings.Join(out, " ")
	}
	for _, step := range []struct {
		change func()
		want   string
	}{
		{func() {}, ""},
		{func() { k.Add(OwnerPrefix) }, "owners/1"},
		{func() { k.Add(PinPrefix + "2") }, "owners/1 pins/2"},
		{func() { k.Add(PinPrefix) }, "owners/1 pins/1 pins/2"},
		{func() { k.Remove(OwnerPrefix) }, "pins/1 pins/2"},
		{func() { k.SetPrefixes(PinPrefix+"1", MovePrefix) }, "moves/1 pins/1"},
		{func() { k.SetPrefixes() }, ""},
		{func() { k.SetPrefixes("") }, "moves/1 owners/1 pins/1 pins/2"},
	} {
		step.change()
		until(t, "the keys "+step.want, k.Changed(), func() bool { return keys() == step.want })
	}
	put(t, c, "owners/2", "a")
	until(t, "a change in the last range", k.Changed(), func() bool { return value(k, "owners/2") == "a" })
}

func TestNewRangeAfterCompactionIsListedWithAllOthers(t *testing.T) {
	log := make(lines, 100)
	s := start(t)
	c := dialLogging(t, s, log.logger())
	put(t, c, "owners/1", "a")
	k := tracked(t, c, OwnerPrefix, MovePrefix)
	for range 3 {
		put(t, c, "pins/1", "a") // the cache, which does not watch it, stays at an older revision
	}
	s.Compact()
	k.Add(PinPrefix)
	until(t, "the pin", k.Changed(), func() bool { return value(k, "pins/1") == "a" })
	if len(log) > 0 {
		t.Errorf("an ordinary compaction is logged: %s", <-log)
	}
}

func TestDisjointPrefixes(t *testing.T) {
	got := disjoint([]string{"pins/", "owners/1", "owners/", "pins/", "moves/1", "moves/1", "moves/10"})
	if want := []string{"moves/1", "moves/10", "owners/", "pins/"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for key, want := range map[string]bool{"owners/7": true, "moves/1": true, "moves/10": true, "moves/100": false, "moves/2": false, "a": false, "z": false} {
		if covered(got, key) != want {
			t.Errorf("%s covered: %t", key, !want)
		}
	}
}

// A member that got its state as a whole answers with an older term until the next write.
func TestAMemberWithAnOlderTermIsNoOtherEtcd(t *testing.T) {
	var h heads
	for i, term := range []uint64{4, 3, 4, 3, 4} {
		restores, err := h.answered(h.ask(), &pb.ResponseHeader{ClusterId: 1, RaftTerm: term, Revision: int64(10 + i)})
		if restores != 0 || (term == 3) != errors.Is(err, errTerm) {
			t.Errorf("term %d: restores %d, %v", term, restores, err)
		}
	}
}
