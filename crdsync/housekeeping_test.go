package crdsync

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

// house is an etcd that is kept, with the leader who keeps it.
type house struct {
	testing.TB
	*housekeeping
	etcd *clientv3.Client
	log  *strings.Builder
}

func newHouse(t testing.TB, etcd *clientv3.Client, endpoints ...string) *house {
	t.Helper()
	client, err := store.Dial(t.Context(), store.Config{Endpoints: endpoints, MemberInterval: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	lead, err := client.Campaign(t.Context(), store.CrdsyncElection, "test", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	h := &house{TB: t, etcd: etcd, log: &strings.Builder{}}
	h.housekeeping = &housekeeping{
		store: client, lead: lead, compactAfter: time.Hour, defragment: true, interval: 50 * time.Millisecond, now: time.Now,
		log: slog.New(slog.NewTextHandler(h.log, nil)),
	}
	return h
}

func (h *house) mustLook() {
	h.Helper()
	if err := h.look(h.Context()); err != nil {
		h.Fatal(err)
	}
}

// lookUntil looks again and again until the condition holds: the members of etcd do what they are asked in their own
// time.
func (h *house) lookUntil(condition func(store.Space) bool) (last store.Space) {
	h.Helper()
	for end := time.Now().Add(deadline); ; time.Sleep(h.interval) {
		h.mustLook()
		var err error
		if last, err = h.store.Space(h.Context()); err != nil {
			h.Fatal(err)
		}
		if condition(last) {
			return last
		}
		if time.Now().After(end) {
			h.Fatalf("space %+v after %v\n%s", last, deadline, h.log)
		}
	}
}

func (h *house) put(n, size int) {
	h.Helper()
	value := string(bytes.Repeat([]byte("x"), size))
	for i := range n {
		if _, err := h.etcd.Put(h.Context(), fmt.Sprint("/others/", i%10), value); err != nil {
			h.Fatal(err)
		}
	}
}

func (h *house) revision() int64 {
	h.Helper()
	r, err := h.etcd.Get(h.Context(), "/others/0")
	if err != nil {
		h.Fatal(err)
	}
	return r.Header.Revision
}

// knows reports whether etcd still has what the keys were at a revision.
func (h *house) knows(revision int64) bool {
	h.Helper()
	_, err := h.etcd.Get(h.Context(), "/others/0", clientv3.WithRev(revision))
	if err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
		h.Fatal(err)
	}
	return err == nil
}

func tiny(cfg *embed.Config) { cfg.QuotaBackendBytes = 4 << 20 }

// fillEtcd writes so many keys, again and again, until etcd raises NOSPACE: with few, history is what fills it.
func fillEtcd(t testing.TB, etcd *clientv3.Client, keys int) {
	t.Helper()
	value := string(bytes.Repeat([]byte("x"), 256<<10))
	there, err := etcd.Get(t.Context(), "/others/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		if _, err := etcd.Put(t.Context(), fmt.Sprint("/others/", (int(there.Count)+i)%keys), value); errors.Is(err, rpctypes.ErrNoSpace) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("etcd is not full")
}

func TestHistoryOlderThanTheLimitIsDroppedWhoeverLeads(t *testing.T) {
	s := etcdtest.New(t)
	h := newHouse(t, s.Client(), s.Endpoint())
	now := time.Now()
	h.now = func() time.Time { return now }
	h.put(10, 10)
	first := h.revision()
	h.mustLook()
	h.put(10, 10)
	if h.mustLook(); !h.knows(first) {
		t.Error("the history was dropped at once")
	}
	second := h.revision()
	now = now.Add(h.compactAfter + time.Second)
	// Another one leads by now: how old the history is stands in etcd.
	next := newHouse2(h)
	if next.mustLook(); next.knows(first - 1) {
		t.Error("history older than the limit is there still")
	}
	if !next.knows(second) {
		t.Error("history was dropped that was not older than the limit when it was looked at")
	}
}

// newHouse2 returns the next leader's.
func newHouse2(h *house) *house {
	k := *h.housekeeping
	k.noted, k.dropped = time.Time{}, 0
	return &house{TB: h.TB, housekeeping: &k, etcd: h.etcd, log: h.log}
}

func TestHousekeepingWritesNothingWhereNothingIsWritten(t *testing.T) {
	s := etcdtest.New(t)
	h := newHouse(t, s.Client(), s.Endpoint())
	h.compactAfter = 10 * time.Millisecond
	h.mustLook()
	before := h.revision()
	for range 5 {
		time.Sleep(h.compactAfter) // it is what is tested
		h.mustLook()
	}
	if now := h.revision(); now != before {
		t.Errorf("revision %d, want %d still", now, before)
	}
}

func TestCompactionByEtcdItselfIsNoFault(t *testing.T) {
	s := etcdtest.New(t, func(cfg *embed.Config) { cfg.AutoCompactionMode, cfg.AutoCompactionRetention = "revision", "5" })
	h := newHouse(t, s.Client(), s.Endpoint())
	h.compactAfter = 10 * time.Millisecond
	for range 5 {
		h.put(20, 10)
		h.mustLook()
		s.Compact() // etcd itself does it once in 5 minutes
		time.Sleep(h.compactAfter)
	}
	if h.log.Len() > 0 {
		t.Errorf("log: %s", h.log)
	}
}

func TestHistoryOfAClockThatWasWrongIsLeftOut(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	at := func(revision int64, d time.Duration) moment { return moment{revision, now.Add(d)} }
	known := history{[]moment{at(10, -3*time.Hour), at(20, -2*time.Hour), at(30, -time.Minute), at(40, time.Hour), at(1000, -3*time.Hour)}}
	if got := known.before(now.Add(-time.Hour), 50); got != 20 {
		t.Errorf("revision %d an hour ago, want 20", got)
	}
	if got := known.before(now.Add(-4*time.Hour), 50); got != 0 {
		t.Errorf("revision %d four hours ago, want none", got)
	}
	want := history{[]moment{at(30, -time.Minute), at(50, 0)}}
	if d := cmp.Diff(want, known.with(at(50, 0), 20)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestARecordThatSomebodyElseWroteHoldsUpNoCompaction(t *testing.T) {
	s := etcdtest.New(t)
	h := newHouse(t, s.Client(), s.Endpoint())
	h.put(10, 10)
	for _, record := range []string{
		"no JSON", `{"revisions":[{"revision":999999,"at":"2020-01-01T00:00:00Z"}]}`, `{"revisions":[{"revision":-1,"at":"2020-01-01T00:00:00Z"}]}`,
	} {
		if _, err := h.etcd.Put(t.Context(), store.DefaultPrefix+store.CompactionKey, record); err != nil {
			t.Fatal(err)
		}
		h.put(1, 10)
		h.noted = time.Time{}
		h.mustLook()
		r, err := h.etcd.Get(t.Context(), store.DefaultPrefix+store.CompactionKey)
		if err != nil || !strings.Contains(string(r.Kvs[0].Value), fmt.Sprint(time.Now().Year())) {
			t.Errorf("after %s the record is %v, %v", record, r, err)
		}
	}
}

func TestWhoDoesNotLeadDoesNothingOnceThereIsSpace(t *testing.T) {
	s := etcdtest.New(t)
	h := newHouse(t, s.Client(), s.Endpoint())
	h.lead = nil
	before := h.revision()
	h.mustLook()
	if now := h.revision(); now != before {
		t.Errorf("revision %d, want %d still", now, before)
	}
}

// Where crdsync may not defragment, as its role in etcd says, who may does so without leading anything, and notes
// nothing.
func TestWhoIsAloneWithEtcdDefragmentsIt(t *testing.T) {
	s := etcdtest.New(t)
	h := newHouse(t, s.Client(), s.Endpoint())
	h.lead, h.alone = nil, true
	value := strings.Repeat("x", 1<<20)
	for range minDefragment>>20 + 8 {
		if _, err := h.etcd.Put(t.Context(), "/others/0", value); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.etcd.Compact(t.Context(), h.revision(), clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	// etcd counts what is free when it writes again
	for end := time.Now().Add(deadline); ; time.Sleep(20 * time.Millisecond) {
		if _, err := h.etcd.Put(t.Context(), "/others/0", "x"); err != nil {
			t.Fatal(err)
		}
		space, err := h.store.Space(t.Context())
		if err != nil || time.Now().After(end) {
			t.Fatalf("%+v, %v: want that less than half is in use", space, err)
		}
		if m := space.Members[0]; m.InUse < m.Size/4 {
			break
		}
	}
	before := h.revision()
	h.lookUntil(func(s store.Space) bool { return s.Fault == nil && s.Members[0].Size < minDefragment/2 })
	if now := h.revision(); now != before {
		t.Errorf("revision %d, want %d still", now, before)
	}
}

func TestTheLeaderOfEtcdIsDefragmentedLast(t *testing.T) {
	m := func(name string, leads bool, size, used int64) store.Member {
		return store.Member{Name: name, Leads: leads, Size: size, InUse: used}
	}
	worth := func(m store.Member) bool { return m.InUse < m.Size/2 }
	a, b, c := m("a", true, 900, 1), m("b", false, 300, 100), m("c", false, 400, 100)
	for _, tt := range []struct {
		name    string
		members []store.Member
		want    string
	}{
		{"the one with most to give back", []store.Member{a, b, c}, "c"},
		{"another before the leader", []store.Member{a, b, m("c", false, 100, 100)}, "b"},
		{"the leader when it alone is worth it", []store.Member{a, m("b", false, 100, 100)}, "a"},
		{"none where it does not pay", []store.Member{m("a", true, 100, 100)}, ""},
	} {
		got := ""
		if w := worst(tt.members, worth); w != nil {
			got = w.Name
		}
		if got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestSpaceIsFreedInAFullEtcd(t *testing.T) {
	for _, members := range []int{1, 3} {
		t.Run(fmt.Sprint(members, " members"), func(t *testing.T) {
			c := etcdtest.NewCluster(t, members, tiny)
			h := newHouse(t, c.Member(0).Client(), c.Endpoints()...)
			var events []string
			h.notify = func(ctx context.Context, n eventText, _ time.Time) error {
				if _, err := h.etcd.Get(ctx, "x", clientv3.WithRev(1)); !errors.Is(err, rpctypes.ErrCompacted) {
					t.Errorf("history: %v, want that it is dropped before an API server is waited for", err)
				}
				events = append(events, n.kind+" "+n.reason)
				return nil
			}
			h.mustLook()
			fillEtcd(t, h.etcd, 1)
			space := h.lookUntil(func(s store.Space) bool { return !s.NoSpace && s.Fault == nil })
			for _, m := range space.Members {
				if m.Size > m.Quota*3/4 { // a member that is behind may have less to give back
					t.Errorf("%v", m)
				}
			}
			h.put(1, 10)
			h.mustLook()
			if d := cmp.Diff([]string{"Warning EtcdNoSpace", "Normal EtcdHasRoom"}, events); d != "" {
				t.Errorf("events (-want +got):\n%s", d)
			}
		})
	}
}

// An API server that does not answer is asked again, for the same Events.
func TestEventsThatEtcdIsFullAreMadeOnce(t *testing.T) {
	var asked []string
	var failure error
	h := &housekeeping{notify: func(ctx context.Context, n eventText, since time.Time) error {
		if _, ends := ctx.Deadline(); !ends {
			t.Error("it is waited for without end")
		}
		asked = append(asked, fmt.Sprint(n.reason, since.UnixNano()))
		return failure
	}}
	look := func(full bool) {
		t.Helper()
		if err := h.notifyFull(t.Context(), store.Space{NoSpace: full}); !errors.Is(err, failure) {
			t.Errorf("error %v, want %v", err, failure)
		}
	}
	for _, full := range []bool{true, false} {
		asked, failure = nil, errors.New("no answer")
		look(full)
		look(full)
		failure = nil
		look(full)
		look(full)
		if len(asked) != 3 || asked[1] != asked[0] || asked[2] != asked[0] {
			t.Errorf("full %t: asked for %q, want the same Events until they are made, three times", full, asked)
		}
	}
	h.told = notice{}
	if asked = nil; h.notifyFull(t.Context(), store.Space{}) != nil || asked != nil {
		t.Errorf("an etcd that was never full: asked for %q", asked)
	}
}

func TestAFullEtcdThatHoldsTooMuchIsAPersonsToMend(t *testing.T) {
	s := etcdtest.New(t, tiny)
	h := newHouse(t, s.Client(), s.Endpoint())
	fillEtcd(t, h.etcd, 100)
	for range 2 * maxStuck {
		h.mustLook()
		// How much a full etcd holds depends on how its writes came together: it may have room once it is defragmented,
		// and others fill that, too.
		if space, err := h.store.Space(t.Context()); err == nil && !space.NoSpace {
			fillEtcd(t, h.etcd, 100)
		}
	}
	if space, err := h.store.Space(t.Context()); err != nil || !space.NoSpace {
		t.Errorf("space %+v, %v: want the alarm to stay", space, err)
	}
	if n := strings.Count(h.log.String(), "a person is needed"); n != 1 {
		t.Errorf("a person is called for %d times, want once:\n%s", n, h.log)
	}
	if _, err := h.etcd.Delete(t.Context(), "/others/", clientv3.WithPrefix()); err != nil { // the person
		t.Fatal(err)
	}
	h.lookUntil(func(s store.Space) bool { return !s.NoSpace })
}

func TestNothingIsDefragmentedWhileAMemberDoesNotAnswer(t *testing.T) {
	c := etcdtest.NewCluster(t, 3, tiny)
	h := newHouse(t, c.Member(0).Client(), c.Endpoints()...)
	fillEtcd(t, h.etcd, 1)
	stuck := (c.Leader() + 1) % 3
	c.Stop(stuck)
	err := h.look(t.Context())
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("etcd%d does not answer", stuck+1)) {
		t.Errorf("error %v, want it to name the member", err)
	}
	space, err := h.store.Space(t.Context())
	if err != nil || !space.NoSpace {
		t.Errorf("space %+v, %v: want the alarm", space, err)
	}
	for _, m := range space.Members {
		if m.Size < m.Quota*3/4 {
			t.Errorf("%v: it was defragmented", m)
		}
	}
	c.Start(stuck)
	h.lookUntil(func(s store.Space) bool { return !s.NoSpace })
}

func TestFlagsLeaveEtcdToOthers(t *testing.T) {
	s := etcdtest.New(t, tiny)
	h := newHouse(t, s.Client(), s.Endpoint())
	h.compactAfter, h.defragment = 0, false
	h.put(10, 10)
	first := h.revision()
	h.mustLook()
	fillEtcd(t, h.etcd, 1)
	h.mustLook()
	if space, err := h.store.Space(t.Context()); err != nil || !space.NoSpace || !h.knows(first) {
		t.Errorf("space %+v, %v, history %t: want all left as it was", space, err, h.knows(first))
	}
}

// day writes 20 pod events a second for so many hours, of which one in spread is made, and about one in spread of the
// nodes. The clock goes by the events: they come as fast as etcd takes them. It returns the largest size of the
// database, in bytes.
func (h *house) day(hours, spread int) (largest int64) {
	h.Helper()
	begin := time.Now()
	now := begin
	h.now = func() time.Time { return now }
	gap := time.Duration(spread) * time.Second / 20
	events, look := int(time.Duration(hours)*time.Hour/gap), int(h.compactAfter/12/gap)
	for first := 0; first < events; first += look {
		var g errgroup.Group
		g.SetLimit(32) // one after another, they would wait for etcd's answers
		for i := range look {
			g.Go(func() error { return h.lead.Commit(h.Context(), podEvent(h, first+i, max(1, 200/spread))...) })
		}
		if err := g.Wait(); err != nil {
			h.Fatal(err)
		}
		now = now.Add(time.Duration(look) * gap)
		h.mustLook()
		largest = max(largest, h.size())
	}
	h.Logf("%d events of %d hours in %v", events, hours, time.Since(begin).Round(time.Second))
	return largest
}

func (h *house) size() (n int64) {
	h.Helper()
	space, err := h.store.Space(h.Context())
	if err != nil {
		h.Fatal(err)
	}
	for _, m := range space.Members {
		n = max(n, m.Size)
	}
	return n
}

// podEvent is what a pod's event writes: the members of an egress on one of the nodes, five pods of both families,
// under two keys.
func podEvent(h *house, i, nodes int) []store.Op {
	h.Helper()
	node, name := fmt.Sprintf("node-%03d", i%nodes), fmt.Sprintf("egress-of-team-%02d", i%7)
	m := egress.Members{Egress: name, Node: node}
	for p := range 5 {
		m.Pods = append(m.Pods, egress.Member{
			Pod: fmt.Sprintf("team-%02d/web-5d4f8c7b9d-%05d", i%7, i+p),
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(i), byte(p)}), netip.MustParseAddr(fmt.Sprintf("fd44:%x::%x", i%nodes, p+2))},
		})
	}
	value, err := store.Encode(m)
	if err != nil {
		h.Fatal(err)
	}
	var ops []store.Op
	for _, key := range memberKeys(node, name) {
		ops = append(ops, store.Op{Key: key, Value: value})
	}
	return ops
}

const mostOfADay = 200 << 20

// TestADayOfPodEventsKeepsEtcdSmall is with a hundredth of the events, of what they are about, and of the room.
// BenchmarkADayOfPodEvents is with all of them.
func TestADayOfPodEventsKeepsEtcdSmall(t *testing.T) {
	const spread = 100
	s := etcdtest.New(t)
	h := newHouse(t, s.Client(), s.Endpoint())
	if n := h.day(24, spread); n > mostOfADay/spread {
		t.Errorf("%s, want %s at most", store.Megabytes(n), store.Megabytes(mostOfADay/spread))
	} else {
		t.Logf("%s at most, which is %s with all events", store.Megabytes(n), store.Megabytes(n*spread))
	}
	if h.log.Len() > 0 {
		t.Errorf("log: %s", h.log)
	}
}

// BenchmarkADayOfPodEvents is 24 hours of 20 pod events a second, 1.7 million.
func BenchmarkADayOfPodEvents(b *testing.B) {
	for b.Loop() {
		s := etcdtest.New(b)
		h := newHouse(b, s.Client(), s.Endpoint())
		n := h.day(24, 1)
		b.ReportMetric(float64(n)/(1<<20), "MB")
		if n > mostOfADay {
			b.Errorf("%s, want %s at most", store.Megabytes(n), store.Megabytes(mostOfADay))
		}
	}
}

// raise raises NOSPACE as etcd does when it is full.
func raise(t testing.TB, etcd *clientv3.Client) {
	t.Helper()
	alarm := &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE, MemberID: 1}
	if _, err := pb.NewMaintenanceClient(etcd.ActiveConnection()).Alarm(t.Context(), alarm); err != nil {
		t.Fatal(err)
	}
}

func testFullEtcd(c *cluster) {
	c.housekeeping = 200 * time.Millisecond
	stop := c.run(c.kube)
	c.example()
	c.wantStatus("egress-prod-web", "10.10.0.11  True Allocated False AssignmentError")
	pool, err := c.dyn.Resource(v1beta1.PoolResource).Get(c.Context(), "external-ip-pool", metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	raise(c, c.etcd.Client())
	c.eventually(func() error {
		events := strings.Join(c.eventsAbout(string(pool.GetUID()), "ExternalIPPool", "external-ip-pool"), "\n")
		full, room := strings.Index(events, "Warning EtcdNoSpace"), strings.Index(events, "Normal EtcdHasRoom")
		if full < 0 || room < full {
			return fmt.Errorf("events of the pool: %q, want that etcd was full, and then that it is not", events)
		}
		return nil
	})

	// Nobody can be elected in a full etcd.
	stop()
	c.own("10.10.0.12", "node-6")
	raise(c, c.etcd.Client())
	c.run(c.kube)
	c.wantStatus("egress-staging-web", "10.10.0.12 node-6 True Allocated True Assigned")
}

// BenchmarkDefragmentation measures for how long etcd answers nobody while its only member, or its leader among three,
// is defragmented, with so many MB in use.
func BenchmarkDefragmentation(b *testing.B) {
	for _, members := range []int{1, 3} {
		for _, used := range []int{8, 32, 128} {
			b.Run(fmt.Sprintf("members=%d/MB=%d", members, used), func(b *testing.B) {
				c := etcdtest.NewCluster(b, members)
				h := newHouse(b, c.Member(0).Client(), c.Endpoints()...)
				for i := range used << 10 {
					if _, err := h.etcd.Put(b.Context(), fmt.Sprint("/others/", i), string(bytes.Repeat([]byte("x"), 1000))); err != nil {
						b.Fatal(err)
					}
				}
				for b.Loop() {
					b.ReportMetric(float64(h.longestSilence().Milliseconds()), "ms-silent")
				}
			})
		}
	}
}

// longestSilence defragments the leader of etcd, and returns the longest time in which no question was sent that was
// answered. The questions are an agent's: one every 20 ms, and none waits for another.
func (h *house) longestSilence() time.Duration {
	h.Helper()
	space, err := h.store.Space(h.Context())
	if err != nil {
		h.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var answered []time.Time
	stop := make(chan struct{})
	wg.Go(func() {
		for tick := time.NewTicker(20 * time.Millisecond); ; {
			select {
			case <-stop:
				return
			case sent := <-tick.C:
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(h.Context(), 500*time.Millisecond)
					defer cancel()
					if _, err := h.store.Etcd().Get(ctx, "/egret/agents/node-1"); err == nil {
						mu.Lock()
						answered = append(answered, sent)
						mu.Unlock()
					}
				})
			}
		}
	})
	time.Sleep(200 * time.Millisecond)
	for _, m := range space.Members {
		if m.Leads {
			begin := time.Now()
			if err := h.store.Defragment(h.Context(), m); err != nil {
				h.Fatal(err)
			}
			h.Logf("%v: %v", m, time.Since(begin).Round(time.Millisecond))
		}
	}
	time.Sleep(200 * time.Millisecond)
	close(stop)
	wg.Wait()
	slices.SortFunc(answered, time.Time.Compare)
	var longest time.Duration
	for i := 1; i < len(answered); i++ {
		longest = max(longest, answered[i].Sub(answered[i-1]))
	}
	return longest
}
