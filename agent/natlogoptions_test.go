package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/natlog"
)

func TestOptionsOfTheLogAreCheckedAtOnce(t *testing.T) {
	err := NATLog{File: "x", Sample: -1, Filter: []string{"pod=x", "ip=x", "egress="}}.Validate()
	for _, want := range []string{`"pod=x"`, `"ip=x"`, `"egress="`, "--nat-log-sample -1", "--nat-log-max-size 0"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: want %s in it", err, want)
		}
	}
	if err := (NATLog{Sample: 5}).Validate(); err == nil {
		t.Error("a sample of no log is taken")
	}
	if err := (NATLog{}).Validate(); err != nil {
		t.Error(err)
	}
}

func TestTheLogGoesToTheStandardOutputAndLeavesItOpen(t *testing.T) {
	out, err := os.Create(filepath.Join(t.TempDir(), "stdout"))
	if err != nil {
		t.Fatal(err)
	}
	defer func(was *os.File) { os.Stdout = was }(os.Stdout)
	os.Stdout = out
	n, err := newNATLogger(natLogConfig{
		cfg: NATLog{File: StandardOutput, MaxSize: 1}, node: "n1", version: "v", log: slog.New(slog.DiscardHandler),
		snapshot: func() *egress.Snapshot { return &egress.Snapshot{} },
		listen:   func() (*conntrack.Events, error) { return nil, errors.New("no connections here") },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.run(ctx) }()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if b, err := os.ReadFile(out.Name()); err == nil && strings.Contains(string(b), string(natlog.LogStart)) {
			break
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(out.Name())
	for _, want := range []natlog.Event{natlog.LogStart, natlog.LogStop} {
		if !strings.Contains(string(b), `"event":"`+string(want)+`"`) {
			t.Errorf("%q, %v: want %s in it", b, err, want)
		}
	}
	if err := out.Close(); err != nil {
		t.Errorf("the standard output was closed: %v", err)
	}
}
