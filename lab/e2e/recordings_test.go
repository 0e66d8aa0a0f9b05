// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// A caller that the API server refuses takes nothing of the disk, whatever it asks for and
// however soon it disconnects.
func TestRecording_RefusedCallerLeavesNoFile(t *testing.T) {
	dir := recordings(theLab)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	ask := func(command string) io.ReadWriteCloser {
		conn := dial(t, theLab.Callers["dave"].Server, lab.ProxyName+":"+portFiles)
		// kubectl's WebSocket, as TestRecording_OfClientThatLeavesEarly has it.
		if _, err := io.WriteString(conn, get("/api/v1/namespaces/default/pods/"+lab.Pod+"/exec?stdout=true&command="+command,
			"Host: "+lab.ProxyName+":"+portFiles, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Protocol: v4.channel.k8s.io",
			"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	for i := range 20 {
		command := strings.Repeat("<", 900_000)
		if i%2 == 0 {
			command = strings.Repeat("x", 1000) // which the API server reads faster
		}
		conn := ask(command)
		time.Sleep(time.Duration(i%6) * time.Millisecond) // a different time in each round
		_ = conn.Close()
	}
	// The others have been decided about before this one is answered, or soon after.
	conn := ask("true")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Fatalf("got %s; want a 403", resp.Status)
	}
	eventually(t, "no file is left", func() error {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) > 0 {
			return errors.Join(fmt.Errorf("the directory holds %v", entries), err)
		}
		return nil
	})
}

// What is typed is recorded where the config says so, and players read it.
func TestRecording_OfInput(t *testing.T) {
	kubeconfig := theLab.Callers["alice"].Kubeconfig + ".input"
	if err := theLab.Callers["alice"].WriteKubeconfig(kubeconfig, "http://"+lab.ProxyName+":"+portInput); err != nil {
		t.Fatal(err)
	}
	forEachProtocol(t, func(t *testing.T, p protocol) {
		if err := os.RemoveAll(recordings(theLab)); err != nil {
			t.Fatal(err)
		}
		cmd := kubectlAs(t, "alice", p, "--kubeconfig", kubeconfig, "exec", "-it", lab.Pod, "--", "sh", "-c", `stty -echo; echo ready; read -r line; echo "$line" | wc -c`)
		onTerminal(t, cmd, func(terminal *os.File, screen func() string) {
			shows := func(what string) {
				t.Helper()
				eventually(t, what+" is on the screen", func() error {
					if !strings.Contains(screen(), what) {
						return fmt.Errorf("the screen shows %q", screen())
					}
					return nil
				})
			}
			shows("ready")
			if _, err := io.WriteString(terminal, "hünted\r"); err != nil {
				t.Fatal(err)
			}
			shows("8")
		})
		var recording []byte
		eventually(t, "a recording file exists", func() error {
			files, err := filepath.Glob(filepath.Join(recordings(theLab), "*.cast"))
			if err != nil || len(files) != 1 {
				return errors.Join(fmt.Errorf("got files %q", files), err)
			}
			recording, err = os.ReadFile(files[0])
			return err
		})
		if got := parseCast(t, recording); got.input != "hünted\r" || strings.Contains(got.output, "hünted") {
			t.Errorf("recorded the input %q and the output %q; want what was typed, which was not echoed", got.input, got.output)
		}
		if diff := cmp.Diff([]string{"ready", "8"}, play(t, recording).Lines); diff != "" {
			t.Errorf("played recording (-want +got):\n%s", diff)
		}
	})
}
