package store

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
)

// deadline bounds every wait of the tests; nothing takes a tenth of it on an idle machine, lease expiry apart.
const deadline = 20 * time.Second

var (
	addr    = netip.MustParseAddr
	compare = cmp.Options{
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	}
)

// start gives the test an etcd server, and checks at the end that no goroutine is left.
func start(t *testing.T) *etcdtest.Server {
	t.Helper()
	leavesNothing(t)
	return etcdtest.New(t)
}

func leavesNothing(t *testing.T) {
	t.Helper()
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for end := time.After(deadline); runtime.NumGoroutine() > before; {
			select {
			case <-tick.C:
			case <-end:
				stacks := make([]byte, 1<<20)
				t.Fatalf("%d goroutines at the start, %d at the end:\n%s", before, runtime.NumGoroutine(), stacks[:runtime.Stack(stacks, true)])
			}
		}
	})
}

// dial connects a client that is closed when the test ends.
func dial(t *testing.T, s *etcdtest.Server) *Client { return dialLogging(t, s, nil) }

func dialLogging(t *testing.T, s *etcdtest.Server, log *slog.Logger) *Client {
	t.Helper()
	// With a DialTimeout near deadline, a lease that is cut off before its first renewal would be taken for lost later
	// than the tests wait.
	return dialConfig(t, Config{Endpoints: []string{s.Endpoint()}, Log: log})
}

func dialConfig(t *testing.T, cfg Config) *Client {
	t.Helper()
	c, err := Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// background runs a Run until the test ends, before the cleanups that were registered earlier.
func background(t *testing.T, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := recv(t, "Run to return", done); err != context.Canceled {
			t.Errorf("Run returned %v, want that its context ended", err)
		}
	})
}

func recv[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(deadline):
		t.Fatalf("waited %v for %s", deadline, what)
		panic("unreachable")
	}
}

// until waits for a condition, which may change whenever changed delivers.
func until(t *testing.T, what string, changed <-chan struct{}, condition func() bool) {
	t.Helper()
	for !condition() {
		recv(t, what, changed)
	}
}

func put(t *testing.T, c *Client, key string, v any) int64 {
	t.Helper()
	b, ok := v.(string)
	if !ok {
		enc, err := Encode(v)
		if err != nil {
			t.Fatal(err)
		}
		b = string(enc)
	}
	resp, err := c.etcd.Put(t.Context(), c.key(key), b)
	if err != nil {
		t.Fatal(err)
	}
	return resp.Header.Revision
}

func del(t *testing.T, c *Client, key string) {
	t.Helper()
	if _, err := c.etcd.Delete(t.Context(), c.key(key)); err != nil {
		t.Fatal(err)
	}
}

// get returns a key's record as etcd has it; the zero Record: there is none.
func get(t *testing.T, c *clientv3.Client, key string) Record {
	t.Helper()
	resp, err := c.Get(t.Context(), DefaultPrefix+key)
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return Record{}
	}
	return recordOf(resp.Kvs[0])
}

// whatever is a revision that a record is not newer than.
const whatever = 1 << 62

func grant(t *testing.T, c *Client, ttl time.Duration) *Lease {
	t.Helper()
	l, err := c.Grant(t.Context(), ttl)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func value(k *Cache, key string) string {
	r, _ := k.Get(key)
	return string(r.Value)
}

// lines is a log as a channel of its messages.
type lines chan string

func (l lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (l lines) Write(b []byte) (int, error) {
	l <- string(b)
	return len(b), nil
}

func TestDialNamesTheEndpointsThatDoNotAnswer(t *testing.T) {
	_, err := Dial(t.Context(), Config{Endpoints: []string{"127.0.0.1:1"}, DialTimeout: 2 * time.Second})
	if err == nil {
		t.Fatal("connected to nobody")
	}
	if !errors.Is(err, ErrNoAnswer) {
		t.Errorf("%v is not ErrNoAnswer", err)
	}
	for _, want := range []string{"connecting to etcd at 127.0.0.1:1: ", "connection refused", ": check --endpoints"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %q, want %q in it", err, want)
		}
	}
	if _, err := Dial(t.Context(), Config{}); err == nil || !strings.HasSuffix(err.Error(), ": check --endpoints") {
		t.Errorf("without endpoints: %v", err)
	}
}

func TestDialWaitsForAnEtcdThatComesUp(t *testing.T) {
	s := start(t)
	s.Cut()
	done := make(chan error, 1)
	go func() {
		c, err := Dial(t.Context(), Config{Endpoints: []string{s.Endpoint()}, DialTimeout: deadline})
		if err == nil {
			err = c.Close()
		}
		done <- err
	}()
	s.Mend()
	if err := recv(t, "Dial", done); err != nil {
		t.Error(err)
	}
}

func TestDialSaysWhenTheUserIsWrong(t *testing.T) {
	s := start(t)
	ctx := t.Context()
	for _, step := range []func() error{
		func() error { _, err := s.Client().UserAdd(ctx, "root", "secret"); return err },
		func() error { _, err := s.Client().UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := s.Client().AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	for _, user := range [][2]string{{"", ""}, {"root", "wrong"}} {
		began := time.Now()
		_, err := Dial(ctx, Config{Endpoints: []string{s.Endpoint()}, Username: user[0], Password: user[1], DialTimeout: deadline})
		if err == nil || !strings.HasSuffix(err.Error(), ": check --user") {
			t.Errorf("user %q: %v", user, err)
		}
		if d := time.Since(began); d > deadline/2 {
			t.Errorf("user %q: took %v, though trying on is of no use", user, d)
		}
	}
	c, err := Dial(ctx, Config{Endpoints: []string{s.Endpoint()}, Username: "root", Password: "secret", DialTimeout: deadline})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// no shorter one: passwords are checked while the machine has other work
	if err := grant(t, c, time.Minute).Renew(ctx); err != nil {
		t.Error(err)
	}
}

func TestPrefixGetsItsSlashAndSeparatesClusters(t *testing.T) {
	s := start(t)
	c, err := Dial(t.Context(), Config{Endpoints: []string{s.Endpoint()}, Prefix: "/blue", DialTimeout: deadline})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	put(t, c, PinKey(addr("10.0.0.1")), egress.Pin{IP: addr("10.0.0.1"), Node: "n1"})
	if resp, err := s.Client().Get(t.Context(), "/blue/pins/10.0.0.1"); err != nil || len(resp.Kvs) != 1 {
		t.Errorf("got %v, %v", resp, err)
	}
	for _, tt := range []struct {
		c    *Client
		want int
	}{{c, 1}, {dial(t, s), 0}} {
		if all, err := tt.c.ReadAll(t.Context()); err != nil || len(all.Pins) != tt.want {
			t.Errorf("below %s: %v, %v, want %d pins", tt.c.Prefix(), all.Pins, err, tt.want)
		}
	}
}

func TestEncodeIsOneLineThatAPersonCanRead(t *testing.T) {
	got, err := Encode(egress.Cordon{Node: "n1", Since: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Why: "disk <sda> & fan"})
	if want := `{"node":"n1","since":"2026-01-02T03:04:05Z","why":"disk <sda> & fan"}`; err != nil || string(got) != want {
		t.Errorf("got %s, %v, want %s", got, err, want)
	}
}

func TestLeaseIDsReadAsEtcdctlPrintsThem(t *testing.T) {
	if got := egress.FormatLease(0x326963a02758b527); got != "326963a02758b527" {
		t.Errorf("got %s", got)
	}
	if id, err := egress.ParseLease("00000000000000ff"); id != 255 || err != nil {
		t.Errorf("got %d, %v", id, err)
	}
	for _, bad := range []string{"", "0", "x", "-1", "ffffffffffffffff"} {
		if id, err := egress.ParseLease(bad); err == nil {
			t.Errorf("%q: got %d", bad, id)
		}
	}
}
