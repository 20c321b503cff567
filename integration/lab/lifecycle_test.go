package lab_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/egret-project/egret/integration/lab"
)

func TestUpThatFailsShowsWhyAndLeavesNothing(t *testing.T) {
	needLab(t)
	name := uniqueName(t, "fails")
	egret := filepath.Join(t.TempDir(), "egret")
	if err := os.WriteFile(egret, []byte("#!/bin/sh\necho the kernel lacks something >&2\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := lab.Up(t.Context(), lab.Config{Name: name, Nodes: 1, Egret: egret})
	if err == nil || !strings.Contains(err.Error(), "the kernel lacks something") || !strings.Contains(err.Error(), "ended") {
		t.Errorf("Up with an egret that ends at once: got error %v, want one that shows its log", err)
	}
}

func TestUpThatIsInterruptedLeavesNothing(t *testing.T) {
	needLab(t)
	name := uniqueName(t, "interrupted")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := lab.Up(ctx, lab.Config{Name: name, Bare: true})
		done <- err
	}()
	waitFor(t, filepath.Join("/run/egret-lab", name, "pids", "kube-apiserver"))
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted Up: got error %v, want %v", err, context.Canceled)
	}
}

func TestDownRemovesWhatAKilledUpLeft(t *testing.T) {
	needLab(t)
	name := uniqueName(t, "killed")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), upVariable+"="+name)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, filepath.Join("/run/egret-lab", name, "pids", "etcd"))
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait() // it was killed
	if _, err := lab.Open(name); err == nil {
		t.Error("opening a lab that is not complete: got no error")
	}
	for range 2 { // there is none the second time
		if err := lab.Down(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
}

func TestConfigReportsEveryFaultAtOnce(t *testing.T) {
	err := lab.Config{Name: "../x", Nodes: 99, LeaseTTL: 1}.Validate()
	if err == nil {
		t.Fatal("got no error")
	}
	for _, want := range []string{`name "../x"`, "nodes 99", "lease TTL 1ns"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not name %s", err, want)
		}
	}
	if err := (lab.Config{}).Validate(); err != nil {
		t.Errorf("zero configuration: %v", err)
	}
	if err := lab.Down(t.Context(), "../x"); err == nil {
		t.Error("Down of a name with a path in it: got no error")
	}
}
