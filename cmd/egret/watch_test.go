package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/syncbuf"
	"github.com/egret-project/egret/store"
)

// TestMain lets the test program be egret, where a test starts it as that: signals and exit statuses are those of a
// process.
func TestMain(m *testing.M) {
	if os.Getenv("EGRET_TEST_MAIN") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// process starts egret with an output of its own.
func process(t *testing.T, out io.Writer, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(self, args...)
	c.Env = append(os.Environ(), "EGRET_TEST_MAIN=1", "TERM=xterm")
	c.Stdout = out
	var complaints syncbuf.Buffer
	c.Stderr = &complaints
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill() // it has ended, unless the test failed
		if t.Failed() {
			t.Logf("it said %q", complaints.String())
		}
	})
	return c
}

// ended waits for a process and returns its exit status.
func ended(t *testing.T, c *exec.Cmd) int {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- c.Wait() }()
	select {
	case err := <-done:
		if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return c.ProcessState.ExitCode()
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
		return 0
	}
}

// at leads to an etcd, also where the machine is busy.
func at(server *etcdtest.Server) []string {
	return []string{"--endpoints", server.Endpoint(), "--dial-timeout", "1m"}
}

func shows(t *testing.T, out *syncbuf.Buffer, what string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !strings.Contains(out.String(), what); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%q is not there:\n%s", what, out.String())
		}
	}
}

func TestWatchingEndsByCtrlC(t *testing.T) {
	server := etcdtest.New(t)
	c := dialed(t, server.Endpoint(), "")
	records(t, c, map[string]any{store.NodeKey("node-1"): egress.Node{Name: "node-1", Index: 1}})
	for name, tt := range map[string]struct {
		args        []string
		first, then string
	}{
		"status":           {[]string{"status", "--watch"}, "1, 0 with a live agent", "1, 1 with a live agent"},
		"status as JSON":   {[]string{"status", "-w", "-o", "json"}, `"all": 1`, `"alive": 1`},
		"describe":         {[]string{"describe", "node", "node-1", "--watch"}, "down", "v9"},
		"get":              {[]string{"get", "nodes", "--watch"}, "down", "v9"},
		"get, with events": {[]string{"get", "agents", "-w", "-o", "name", "--output-watch-events"}, "", "agents/node-1"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := c.Etcd().Delete(t.Context(), c.Prefix()+store.AgentKey("node-1")); err != nil {
				t.Fatal(err)
			}
			var out syncbuf.Buffer
			p := process(t, &out, append(tt.args, at(server)...)...)
			shows(t, &out, tt.first)
			records(t, c, map[string]any{store.AgentKey("node-1"): egress.Agent{Node: "node-1", Version: "v9", Lease: "a1"}})
			shows(t, &out, tt.then)
			if err := p.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			if status := ended(t, p); status != 0 {
				t.Errorf("exit status %d, want 0", status)
			}
			if strings.Contains(out.String(), "\x1b") {
				t.Errorf("there is no terminal, and it draws:\n%q", out.String())
			}
		})
	}
}

func TestWatchingWithoutEtcdIsAnError(t *testing.T) {
	for _, args := range [][]string{{"status", "-w"}, {"describe", "node", "a", "-w"}, {"get", "nodes", "-w"}} {
		var out bytes.Buffer
		if status := ended(t, process(t, &out, append(args, "--endpoints", "127.0.0.1:1", "--dial-timeout", "300ms")...)); status != 1 || out.Len() > 0 {
			t.Errorf("%s: exit status %d, %q", args, status, out.String())
		}
	}
}

func TestWatchingStopsWhenNobodyReads(t *testing.T) {
	server := etcdtest.New(t)
	c := dialed(t, server.Endpoint(), "")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := process(t, w, append([]string{"status", "-w"}, at(server)...)...)
	w.Close()
	if _, err := r.Read(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	r.Close()
	stop := make(chan struct{})
	changing := make(chan struct{})
	go func() {
		defer close(changing)
		for i := 1; ; i++ {
			value, err := store.Encode(egress.Node{Name: "node-1", Index: i})
			if err == nil {
				_, err = c.Etcd().Put(t.Context(), c.Prefix()+store.NodeKey("node-1"), string(value))
			}
			if err != nil {
				t.Error(err)
				return
			}
			if i%2 == 0 {
				_, _ = c.Etcd().Delete(t.Context(), c.Prefix()+store.NodeKey("node-1")) // so that there is something to print
			}
			select {
			case <-time.After(100 * time.Millisecond):
			case <-stop:
				return
			}
		}
	}()
	ended(t, p) // by SIGPIPE
	close(stop)
	<-changing
	if status, ok := p.ProcessState.Sys().(syscall.WaitStatus); !ok || !status.Signaled() || status.Signal() != syscall.SIGPIPE {
		t.Errorf("it ended as %v", p.ProcessState)
	}
}

func TestWatchingDrawsAtATerminal(t *testing.T) {
	server := etcdtest.New(t)
	c := dialed(t, server.Endpoint(), "")
	records(t, c, map[string]any{store.NodeKey("node-1"): egress.Node{Name: "node-1", Index: 1}})
	person, program := terminal(t)
	if err := unix.IoctlSetWinsize(int(person.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 10, Col: 60}); err != nil {
		t.Fatal(err)
	}
	var out syncbuf.Buffer
	go func() {
		_, _ = io.Copy(&out, person) // it ends with an error when the other end is closed
	}()
	p := process(t, program, append([]string{"status", "-w"}, at(server)...)...)
	shows(t, &out, "with a live agent")
	if err := unix.IoctlSetWinsize(int(person.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 4, Col: 200}); err != nil {
		t.Fatal(err)
	}
	shows(t, &out, "more lines") // the next picture has the window's new size
	if err := p.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if status := ended(t, p); status != 0 {
		t.Errorf("exit status %d, want 0", status)
	}
	pictures := strings.Split(out.String(), "\x1b[H")
	for _, picture := range pictures[1:] {
		if !strings.HasPrefix(picture, "egret status ") || strings.Count(picture, "\n") > 9 {
			t.Errorf("a picture is %q", picture)
		}
	}
}

func TestADumbTerminalIsNotDrawnOn(t *testing.T) {
	_, program := terminal(t)
	c := root()
	c.SetOut(program)
	t.Setenv("TERM", "dumb")
	if screen(c).Size != nil {
		t.Error("it is drawn on")
	}
	t.Setenv("TERM", "xterm")
	if screen(c).Size == nil {
		t.Error("it is not drawn on")
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	c.SetOut(file)
	if screen(c).Size != nil {
		t.Error("a file is drawn on")
	}
}
