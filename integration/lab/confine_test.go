package lab

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAnAgentMayLoadProgramsOnlyWithTheFastPath(t *testing.T) {
	usual := []int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW}
	fast := append(slices.Clone(usual), unix.CAP_PERFMON, unix.CAP_BPF)
	for _, tt := range []struct {
		name  string
		flags []string
		want  []int
	}{
		{"no flags", nil, usual},
		{"the flag", []string{"--fast-path"}, fast},
		{"the flag with a value", []string{"--permit=1s", "--fast-path=true"}, fast},
		{"the flag that it is off", []string{"--fast-path=false"}, usual},
		{"the last one counts", []string{"--fast-path", "--fast-path=false"}, usual},
		{"a value that is none", []string{"--fast-path=perhaps"}, usual},
		{"another flag with that beginning", []string{"--fast-path-x"}, usual},
	} {
		got := capabilities(append([]string{"egret", "agent"}, tt.flags...))
		if slices.Sort(got); !slices.Equal(got, tt.want) {
			t.Errorf("%s: capabilities %v, want %v", tt.name, got, tt.want)
		}
	}
}
