package lab_test

import (
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The README's commands, in their order, in a lab with a name of its own.
func TestTheCommandsOfTheREADMEMakeALab(t *testing.T) {
	needLab(t)
	name := uniqueName(t, "readme")
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	const program = "bin/egret-lab"
	var ran []string
	out := map[string]string{}
	for _, found := range regexp.MustCompile(`(?m)^ {4}`+program+` (.*)$`).FindAllStringSubmatch(string(b), -1) {
		command := found[1]
		cmd := exec.CommandContext(t.Context(), program, append([]string{"--name", name}, strings.Fields(command)...)...)
		cmd.Dir = "../.."
		var log strings.Builder
		cmd.Stderr = &log
		printed, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", program, command, err, log.String())
		}
		t.Logf("%s %s\n%s%s", program, command, log.String(), printed)
		ran = append(ran, strings.Fields(command)[0])
		out[command] = strings.TrimSpace(string(printed))
	}
	if want := []string{"up", "pod", "source", "source", "throughput", "down"}; !slices.Equal(ran, want) {
		t.Fatalf("the README has %q, want %q", ran, want)
	}
	for command, is4 := range map[string]bool{"source prod/web-1": true, "source prod/web-1 --family 6": false} {
		if ip, err := netip.ParseAddr(out[command]); err != nil || ip.Is4() != is4 {
			t.Errorf("%s: got %q, want an address", command, out[command])
		}
	}
	const throughput = "throughput prod/web-1"
	if rate, err := strconv.ParseFloat(out[throughput], 64); err != nil || rate <= 0 {
		t.Errorf("%s: got %q, want Mbit/s", throughput, out[throughput])
	}
}
