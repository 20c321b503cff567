package conntrack

import "testing"

func TestPortsOfEndedConnectionsAreTakenSinceLinux66(t *testing.T) {
	for release, want := range map[string]bool{
		"6.1.0-56-amd64": false, "5.15.0": false, "6.5.13": false, "6.6.0": true, "6.6-rc1": true, "6.18.44-fc": true, "7.0.1": true, "": false, "x": false,
	} {
		if got := reusesPorts(release); got != want {
			t.Errorf("%q: %t, want %t", release, got, want)
		}
	}
}
