package agent

import (
	"errors"
	"testing"
)

// A DaemonSet goes on to the next node when the agent of this one is ready.
func TestAnAgentIsReadyWhenAPassIsWhole(t *testing.T) {
	var r readiness
	if r.check() == nil {
		t.Error("ready before any round")
	}
	fault := errors.New("creating table inet egret: operation not supported")
	if r.reconciled(fault) {
		t.Error("ready by a round that failed")
	}
	if err := r.check(); !errors.Is(err, fault) {
		t.Errorf("after a round that failed: %v, want its error", err)
	}
	if !r.reconciled(nil) || r.reconciled(nil) {
		t.Error("the first whole round, and no other, makes it ready")
	}
	r.reconciled(fault)
	if err := r.check(); err != nil {
		t.Errorf("an agent that worked is not ready for a later fault: %v", err)
	}
}
