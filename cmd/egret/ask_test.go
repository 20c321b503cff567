package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/syncbuf"
	"github.com/egret-project/egret/store"
)

// terminal returns both ends of a terminal: that of the person, and that of the program.
func terminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return person, program
}

// dialogue runs a command at a terminal, types an answer when it is asked, and returns what the person read, and the
// error.
func dialogue(t *testing.T, ctx context.Context, answer string, args ...string) (string, error) {
	t.Helper()
	person, program := terminal(t)
	var read syncbuf.Buffer
	go func() {
		_, _ = io.Copy(&read, person) // it ends with an error when the other end is closed
	}()
	c := root()
	c.SetArgs(args)
	var out bytes.Buffer
	c.SetIn(program)
	c.SetErr(program)
	c.SetOut(&out)
	done := make(chan error, 1)
	go func() { done <- c.ExecuteContext(ctx) }()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	const last = "that is all"
	typed, err, over := answer == "", error(nil), false
	for end := time.After(20 * time.Second); ; {
		select {
		case err = <-done:
			over = true
			if _, werr := program.WriteString(last); werr != nil {
				t.Fatal(werr)
			}
		case <-tick.C:
			if said, _, all := strings.Cut(read.String(), last); over && all {
				return said + out.String(), err
			}
			if !typed && strings.Contains(read.String(), "[y/N]") {
				typed = true
				if _, err := person.WriteString(answer); err != nil {
					t.Fatal(err)
				}
			}
		case <-end:
			t.Fatalf("not done; the person reads %q", read.String())
		}
	}
}

// An attempt: the record of a pin names a node that a terminal would obey, and move --force quotes it in its question.
func TestAQuestionCommandsNoTerminal(t *testing.T) {
	person, program := terminal(t)
	var read syncbuf.Buffer
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(&read, person) // it ends with an error when the other end is closed
	}()
	c := root()
	c.SetIn(program)
	c.SetErr(program)
	c.SetContext(t.Context())
	if _, err := person.WriteString("n\n"); err != nil {
		t.Fatal(err)
	}
	var q question
	err := q.ask(c, func() (string, error) { return "it is pinned to node-1\x1b]0;evil\x07\u009b2J:\nand so on", nil })
	program.Close()
	<-copied
	const want = "node-1?]0;evil??2J:\r\nand so on\r\nGo on?"
	if got := read.String(); !errors.Is(err, errDeclined) || strings.ContainsAny(got, "\x1b\x07\u009b") || !strings.Contains(got, want) {
		t.Errorf("%v; the person reads %q, want %q in it", err, got, want)
	}
}

func TestWhatCostsSomebodySomethingIsAskedAtATerminal(t *testing.T) {
	server := etcdtest.New(t)
	c := dialed(t, server.Endpoint(), "")
	ip, static := netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("10.10.0.101")
	seed := func() {
		records(t, c, map[string]any{
			store.NodeKey("node-1"):  egress.Node{Name: "node-1", Index: 1},
			store.NodeKey("node-2"):  egress.Node{Name: "node-2", Index: 2, Capacity: 1},
			store.AgentKey("node-1"): egress.Agent{Node: "node-1", Lease: "1"},
			store.AgentKey("node-2"): egress.Agent{Node: "node-2", Lease: "2"},
			store.PoolKey("pool"):    egress.Pool{Name: "pool", Ranges: []egress.Range{{Start: ip, End: ip}}},
			store.EgressKey("web"):   egress.Policy{Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}},
			store.EgressKey("mail"):  egress.Policy{Name: "mail", Addresses: []egress.Address{{IP: static, ID: 2}}},
			store.OwnerKey(ip):       egress.Owner{IP: ip, Node: "node-1"},
			store.OwnerKey(static):   egress.Owner{IP: static, Node: "node-1"},
			store.PinKey(ip):         egress.Pin{IP: ip, Node: "node-1"},
		})
		if _, err := c.Uncordon(t.Context(), "node-1"); err != nil {
			t.Fatal(err)
		}
	}
	cordoned := func() bool {
		t.Helper()
		all, err := c.ReadAll(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, ok := all.Cordons["node-1"]
		return ok
	}
	at := []string{"--endpoints", server.Endpoint()}
	for name, tt := range map[string]struct {
		args, answer string
		says         string // to the person; "": nothing is asked
		done         bool
	}{
		"drain, and yes":        {"drain node-1", "y\n", "the 1 that it holds move to other nodes, one at a time: 10.10.0.11 (web).", true},
		"drain, and the static": {"drain node-1", "yes\n", "It keeps the 1 that are static: 10.10.0.101 (mail).", true},
		"drain, and no":         {"drain node-1", "n\n", "node-1 takes no egress IPs from now on", false},
		"drain, and only enter": {"drain node-1", "\n", "[y/N]", false},
		"drain, and what is no": {"drain node-1", "yep\n", "[y/N]", false},
		"drain, and the end":    {"drain node-1", "\x04", "[y/N]", false},
		"drain --yes":           {"drain node-1 --yes", "", "", true},
		"cordon":                {"cordon node-1", "n\n", "10.10.0.11 (web)", false},
		"cordon, and yes":       {"cordon node-1", "Y\n", "10.10.0.11 (web)", true},
		"cordon -y":             {"cordon node-1 -y", "", "", true},
	} {
		t.Run(name, func(t *testing.T) {
			seed()
			out, err := dialogue(t, t.Context(), tt.answer, append(strings.Fields(tt.args), at...)...)
			if strings.Contains(out, "[y/N]") != (tt.says != "") || !strings.Contains(out, tt.says) {
				t.Errorf("the person reads %q, want %q in it", out, tt.says)
			}
			if (err == nil) != tt.done || cordoned() != tt.done {
				t.Errorf("error %v, cordoned %t; want it done: %t", err, cordoned(), tt.done)
			}
			if err != nil && !strings.Contains(err.Error(), "nothing was changed") {
				t.Errorf("error %v: want one that says that nothing was changed", err)
			}
		})
	}
	t.Run("a node that holds nothing", func(t *testing.T) {
		seed()
		if out, err := dialogue(t, t.Context(), "", append(strings.Fields("cordon node-2"), at...)...); err != nil || strings.Contains(out, "[y/N]") {
			t.Errorf("%v, %q; want no question", err, out)
		}
		if out, err := dialogue(t, t.Context(), "", append(strings.Fields("drain node-9"), at...)...); err == nil || strings.Contains(out, "[y/N]") || !strings.Contains(err.Error(), "no such node") {
			t.Errorf("%v, %q; want an error, and no question", err, out)
		}
	})
	t.Run("a move away from a pin", func(t *testing.T) {
		seed()
		if _, err := c.Uncordon(t.Context(), "node-2"); err != nil {
			t.Fatal(err)
		}
		args := append(strings.Fields("move 10.10.0.11 --to node-2 --force --timeout 2s"), at...)
		out, err := dialogue(t, t.Context(), "n\n", args...)
		if err == nil || !strings.Contains(err.Error(), "nothing was changed") || !strings.Contains(out, "it is pinned to node-1") || strings.Contains(out, "--force moves") {
			t.Errorf("%v, %q", err, out)
		}
		if out, err = dialogue(t, t.Context(), "", append(strings.Fields("move 10.10.0.11 --to node-1 --force"), at...)...); err != nil || strings.Contains(out, "[y/N]") {
			t.Errorf("to where it is pinned: %v, %q", err, out)
		}
	})
	t.Run("where nobody is", func(t *testing.T) {
		seed()
		if out, err := run(t, append(strings.Fields("drain node-1"), at...)...); err != nil || !cordoned() || strings.Contains(out, "[y/N]") {
			t.Errorf("%v, %q; want that it is done, as scripts have it", err, out)
		}
	})
	t.Run("interrupted", func(t *testing.T) {
		seed()
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		if out, err := dialogue(t, ctx, "", append(strings.Fields("drain node-1"), at...)...); err == nil || cordoned() {
			t.Errorf("%v, %q; want an error, and nothing done", err, out)
		}
	})
}
