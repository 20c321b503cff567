package operator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/syncbuf"
	"github.com/egret-project/egret/store"
)

// following runs what follows etcd until the test stops it, and returns what stops it and gives its error.
func following(t *testing.T, run func(context.Context) error) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	return func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(30 * time.Second):
			return errors.New("it does not end")
		}
	}
}

func TestWatchStatusPrintsWhatChanged(t *testing.T) {
	c := client(t)
	put(t, c, store.NodeKey("node-1"), egress.Node{Name: "node-1", Index: 1})
	var text, asJSON, asYAML syncbuf.Buffer
	stops := []func() error{
		following(t, func(ctx context.Context) error { return WatchStatus(ctx, c, "", Screen{Out: &text}) }),
		following(t, func(ctx context.Context) error { return WatchStatus(ctx, c, "json", Screen{Out: &asJSON}) }),
		following(t, func(ctx context.Context) error { return WatchStatus(ctx, c, "yaml", Screen{Out: &asYAML}) }),
	}
	awaitText(t, &text, "1, 0 with a live agent", 1)
	awaitText(t, &asYAML, "alive", 0)
	put(t, c, store.CordonKey("node-9"), "x") // other revisions and other ages are no news: this one is seen, and then a pin of nobody is not
	awaitText(t, &text, "cordons/node-9", 1)
	seen := text.String()
	put(t, c, store.PinKey(ip), egress.Pin{IP: ip, Node: "node-1"})
	put(t, c, store.AgentKey("node-1"), egress.Agent{Node: "node-1", Version: "v9", Lease: "a1"})
	awaitText(t, &text, "1, 1 with a live agent", 1)
	awaitText(t, &asJSON, `"alive": 1`, 1)
	awaitText(t, &asYAML, "alive: 1", 1)
	for _, stop := range stops {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
	reports := strings.Split(strings.TrimPrefix(text.String(), seen), "\n\n")
	if !strings.HasPrefix(text.String(), seen) || len(reports) != 2 || reports[1] != "" {
		t.Errorf("after\n%s\nwant one report, not\n%q", seen, reports)
	}
	for _, report := range reports[:1] {
		first, _, _ := strings.Cut(report, "\n")
		if _, err := time.Parse(time.RFC3339, first); err != nil {
			t.Errorf("a report begins with %q: %v", first, err)
		}
	}
	documents := 0
	for d := json.NewDecoder(strings.NewReader(asJSON.String())); d.More(); documents++ {
		var o overview
		if err := d.Decode(&o); err != nil {
			t.Fatalf("document %d: %v", documents, err)
		}
	}
	if documents < 2 || !strings.HasPrefix(asYAML.String(), "---\n") {
		t.Errorf("%d documents of JSON, and YAML\n%s", documents, asYAML.String())
	}
}

func TestWatchDescribeFollowsWhatGoesAndComesAgain(t *testing.T) {
	c := client(t)
	if err := WatchDescribe(t.Context(), c, "egress", "web", Screen{Out: &bytes.Buffer{}}); err == nil || !strings.Contains(err.Error(), "`egret get egresses`") {
		t.Errorf("of an egress that was never there: %v", err)
	}
	web := egress.Policy{Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}}
	put(t, c, store.EgressKey("web"), web)
	var out syncbuf.Buffer
	stop := following(t, func(ctx context.Context) error { return WatchDescribe(ctx, c, "egress", "web", Screen{Out: &out}) })
	awaitText(t, &out, "on no node", 1)
	put(t, c, store.OwnerKey(ip), egress.Owner{IP: ip, Node: "node-1", Why: egress.ReasonClaim, Since: time.Now()})
	awaitText(t, &out, "on node-1 for", 1)
	del(t, c, store.EgressKey("web"))
	awaitText(t, &out, "there is no egress web", 1)
	put(t, c, store.EgressKey("web"), web)
	awaitText(t, &out, "on node-1 for", 2)
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// An IP's description has its history, which etcd keeps apart.
func TestWatchDescribeShowsTheHistoryAsItGrows(t *testing.T) {
	c := client(t)
	put(t, c, store.EgressKey("web"), egress.Policy{Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}})
	var out syncbuf.Buffer
	stop := following(t, func(ctx context.Context) error { return WatchDescribe(ctx, c, "ip", ip.String(), Screen{Out: &out}) })
	awaitText(t, &out, "on no node", 1)
	tenure := egress.Tenure{IP: ip, Node: "node-7", Since: time.Now(), Why: egress.ReasonClaim}
	put(t, c, store.HistoryKey(tenure), tenure)
	awaitText(t, &out, "node-7", 1)
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// putPast puts a record by a connection of its own, that no outage has broken.
func putPast(t *testing.T, server *etcdtest.Server, key string, record any) {
	t.Helper()
	c := clientOf(t, server)
	put(t, c, key, record)
}

// A screen is drawn anew also where nothing changed: ages and the clock go on, and an etcd that is gone is told of.
func TestWatchDrawsOnATerminal(t *testing.T) {
	server := etcdtest.New(t)
	c := clientOf(t, server)
	put(t, c, store.NodeKey("node-1"), egress.Node{Name: "node-1", Index: 1})
	var out syncbuf.Buffer
	screen := Screen{Out: &out, Size: func() (int, int) { return 100, 12 }}
	stop := following(t, func(ctx context.Context) error { return WatchStatus(ctx, c, "", screen) })
	awaitText(t, &out, "1, 0 with a live agent", 3)
	awaitText(t, &out, "live\x1b[K", 1)
	server.Cut()
	awaitText(t, &out, "etcd is not followed: this may be old", 1)
	server.Mend()
	putPast(t, server, store.AgentKey("node-1"), egress.Agent{Node: "node-1", Lease: "a1"})
	awaitText(t, &out, "1, 1 with a live agent", 1)
	if err := stop(); err != nil {
		t.Error(err)
	}
	pictures := strings.Split(out.String(), "\x1b[H")
	if pictures[0] != strings.Repeat("\n", 12) {
		t.Errorf("it begins with %q: what was on the screen is drawn over", pictures[0])
	}
	if strings.Contains(pictures[1], "not followed") {
		t.Errorf("the first picture is %q: it was read right before", pictures[1])
	}
	for _, p := range pictures[1:] {
		if !strings.HasPrefix(p, "egret status   ") || !strings.HasSuffix(p, "\x1b[K\n\x1b[J") || strings.Count(p, "\n") > 11 {
			t.Errorf("a picture of %d lines: %q", strings.Count(p, "\n"), p)
		}
	}
}

func TestATextIsFitToAScreen(t *testing.T) {
	for name, tt := range map[string]struct {
		text          string
		columns, rows int
		want          []string
	}{
		"it has room":             {"one\ntwo\n", 10, 3, []string{"one", "two"}},
		"long lines are broken":   {"abcdefgh\nü2345678\n", 5, 9, []string{"abcde", "fgh", "ü2345", "678"}},
		"more than has room":      {"1\n2\n3\n4\n", 20, 3, []string{"1", "2", "... and 2 more lines"}},
		"a narrow one":            {"1\n2\n3\n", 3, 2, []string{"1", "..."}},
		"no room for anything":    {"1\n2\n", 0, 0, []string{"."}},
		"an empty line is a line": {"1\n\n2\n", 9, 9, []string{"1", "", "2"}},
	} {
		if diff := cmp.Diff(tt.want, fit(tt.text, tt.columns, tt.rows)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestWatchWithoutEtcdFailsAtOnce(t *testing.T) {
	server := etcdtest.New(t)
	c := clientOf(t, server)
	server.Cut()
	var out bytes.Buffer
	if err := WatchStatus(t.Context(), c, "", Screen{Out: &out}); err == nil || out.Len() > 0 {
		t.Errorf("status: %v, %q", err, out.String())
	}
	if err := WatchDescribe(t.Context(), c, "ip", netip.MustParseAddr("10.0.0.1").String(), Screen{Out: &out}); err == nil {
		t.Error("describe: no error")
	}
}
