// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	sessionrecorder "github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/recorder"
)

// absentRecorder is an unused address of the tailnet.
const absentRecorder = "100.127.255.254:80"

// startSessionRecorder adds a recorder to the tailnet and grants that name it to the
// policy: fay's sessions are recorded if possible, gus's have to be recorded, and
// hal and ida have the same grants as gus and fay, with a recorder that does not
// exist.
func startSessionRecorder(ctx context.Context) error {
	var err error
	if sessions, err = sessionrecorder.Start(ctx, theLab); err != nil {
		return err
	}
	for _, grant := range []sessionrecorder.Grant{
		{Login: "fay@example.com", Group: masters(), Recorder: sessions.Addr.String()},
		{Login: "gus@example.com", Group: masters(), Recorder: sessions.Addr.String(), Enforce: true},
		{Login: "hal@example.com", Group: masters(), Recorder: absentRecorder, Enforce: true},
		{Login: "ida@example.com", Group: masters(), Recorder: absentRecorder},
	} {
		if theLab.Policy, err = grant.AddTo(theLab.Policy); err != nil {
			return err
		}
	}
	return theLab.Headscale.SetPolicy(ctx, theLab.Policy)
}

// recordings is the folder of the site that records to files.
func recordings(l *lab.Lab) string { return filepath.Join(l.Dir, "recordings") }

// useRecorder waits until the grants of the recorded callers are in force, and sets
// the recorder's mode for the test.
func useRecorder(t *testing.T, mode recordertest.Mode) {
	t.Helper()
	for _, caller := range []string{"fay", "gus", "hal", "ida"} {
		eventually(t, caller+" may list secrets", func() error {
			_, stderr, err := tryKubectl(t, caller, "get", "secrets")
			if err != nil {
				return fmt.Errorf("%w: %s", err, stderr)
			}
			return nil
		})
	}
	sessions.SetMode(mode)
	sessions.Take()
	t.Cleanup(func() { sessions.SetMode(recordertest.V2) })
}

// cast is a recording, as read by a parser other than the one that wrote it.
type cast struct {
	header sessionrecording.CastHeader
	output string
	input  string
	sizes  []string
}

// parseCast reads a recording.
func parseCast(t *testing.T, b []byte) (c cast) {
	t.Helper()
	lines := bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n"))
	if err := json.Unmarshal(lines[0], &c.header); err != nil {
		t.Fatalf("the header of the recording: %v: %s", err, lines[0])
	}
	last := 0.0
	var output strings.Builder
	defer func() { c.output = output.String() }()
	for _, line := range lines[1:] {
		var event [3]any
		if err := json.Unmarshal(line, &event); err != nil {
			t.Fatalf("a line of the recording: %v: %.200s", err, line)
		}
		at, data := event[0].(float64), event[2].(string)
		if at < last {
			t.Errorf("an event at %v follows one at %v", at, last)
		}
		last = at
		switch event[1] {
		case "o":
			output.WriteString(data)
		case "i":
			c.input += data
		case "r":
			c.sizes = append(c.sizes, data)
		default:
			t.Errorf("an event of the unknown type %v", event[1])
		}
	}
	return c
}

// recorded waits until the only recording since the last call is complete, and
// returns it.
func recorded(t *testing.T) (*recordertest.Recording, cast) {
	t.Helper()
	var taken []*recordertest.Recording
	eventually(t, "the recorder has a recording", func() error {
		if taken = append(taken, sessions.Take()...); len(taken) == 0 {
			return errors.New("no recording")
		}
		return nil
	})
	if len(taken) != 1 {
		t.Fatalf("the recorder has %d recordings; want 1", len(taken))
	}
	select {
	case <-taken[0].Ended():
	case <-time.After(30 * time.Second):
		t.Fatal("the recording did not end")
	}
	if err := taken[0].Err(); err != nil {
		t.Errorf("the recording was cut off: %v", err)
	}
	return taken[0], parseCast(t, taken[0].Bytes())
}

// recordedSession describes a session in the header of its recording.
type recordedSession struct{ pod, kind, command string }

// checkHeader checks the caller and the session that a recording's header names.
func checkHeader(t *testing.T, got sessionrecording.CastHeader, caller string, s recordedSession) {
	t.Helper()
	if age := time.Since(time.Unix(got.Timestamp, 0)); age < 0 || age > time.Minute {
		t.Errorf("the recording's timestamp is %v ago", age)
	}
	if got.SrcNodeID == "" || got.SrcNodeUserID == 0 {
		t.Errorf("the recording lacks the node's or the user's ID: %+v", got)
	}
	want := sessionrecording.CastHeader{
		Version: 2, Width: got.Width, Height: got.Height, Timestamp: got.Timestamp, Command: s.command,
		SrcNode: caller + "." + lab.Domain, SrcNodeID: got.SrcNodeID, SrcNodeUser: caller + "@example.com", SrcNodeUserID: got.SrcNodeUserID,
		Env:        map[string]string{},
		Kubernetes: &sessionrecording.Kubernetes{PodName: s.pod, Namespace: "default", Container: got.Kubernetes.Container, SessionType: s.kind},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the recording's header (-want +got):\n%s", diff)
	}
}

// onTerminal runs kubectl on a terminal and returns everything it showed. It calls
// talk with the terminal and a function that returns what it has shown so far.
func onTerminal(t *testing.T, cmd *exec.Cmd, talk func(terminal *os.File, screen func() string)) string {
	t.Helper()
	terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 30, Cols: 100})
	if err != nil {
		t.Fatal(err)
	}
	var screen lockedBuffer
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(&screen, terminal) // ends with EIO when kubectl does
	}()
	talk(terminal, screen.String)
	_ = cmd.Wait() // it has the command's exit code
	<-read
	_ = terminal.Close()
	return screen.String()
}

func kubectlAs(t *testing.T, caller string, p protocol, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	cmd, err := theLab.Callers[caller].Kubectl(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(cmd.Env, p.env...)
	return cmd
}

// versionsOfRecorders are the recorder modes with their protocol versions.
var versionsOfRecorders = []struct {
	version int
	mode    recordertest.Mode
}{{1, recordertest.V1}, {2, recordertest.V2}}

func TestRecording_MatchesTerminal(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		for _, v := range versionsOfRecorders {
			t.Run(fmt.Sprintf("recorder version %d", v.version), func(t *testing.T) {
				useRecorder(t, v.mode)
				const script = `echo "grüße 日本 & <you>"; while read -r line; do case $line in exit) exit 7;; *) stty size;; esac; done`
				cmd := kubectlAs(t, "gus", p, "exec", "-it", lab.Pod, "--", "sh", "-c", script)
				shown := onTerminal(t, cmd, func(terminal *os.File, screen func() string) {
					sees := func(size string) {
						t.Helper()
						eventually(t, "the command sees a terminal of "+size, func() error {
							if _, err := io.WriteString(terminal, "size\r"); err != nil {
								return err
							}
							if !strings.Contains(screen(), size) {
								return fmt.Errorf("the screen shows %q", screen())
							}
							return nil
						})
					}
					// Until then, kubectl has not taken over the terminal.
					eventually(t, "the command prints its greeting", func() error {
						if !strings.Contains(screen(), "<you>") {
							return fmt.Errorf("the screen shows %q", screen())
						}
						return nil
					})
					sees("30 100")
					if err := pty.Setsize(terminal, &pty.Winsize{Rows: 41, Cols: 123}); err != nil {
						t.Fatal(err)
					}
					sees("41 123")
					if _, err := io.WriteString(terminal, "exit\r"); err != nil {
						t.Fatal(err)
					}
				})
				recording, got := recorded(t)
				if recording.Version != v.version {
					t.Errorf("the recorder's protocol version was %d; want %d", recording.Version, v.version)
				}
				checkHeader(t, got.header, "gus", recordedSession{lab.Pod, "exec", "sh -c " + script})
				if got.header.Width != 100 || got.header.Height != 30 {
					t.Errorf("the recording starts with %dx%d; want 100x30", got.header.Width, got.header.Height)
				}
				if len(got.sizes) == 0 || got.sizes[len(got.sizes)-1] != "123x41" {
					t.Errorf("the recording's sizes are %q; want 123x41 as the last", got.sizes)
				}
				// kubectl's own last line is not part of the session.
				if got.output == "" || !strings.HasPrefix(shown, got.output) {
					t.Errorf("recorded %q; the terminal showed %q", got.output, shown)
				} else if rest := strings.TrimPrefix(shown, got.output); rest != "" && !strings.HasPrefix(rest, "command terminated with exit code 7") {
					t.Errorf("not recorded: %q", rest)
				}
			})
		}
	})
}

func TestRecording_OfSessionWithoutTerminal(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		useRecorder(t, recordertest.V2)
		for _, caller := range []string{"fay", "gus"} {
			cmd := kubectlAs(t, caller, p, "exec", "-i", lab.Pod, "-c", "main", "--", "sh", "-c", "cat; echo problem >&2; exit 42")
			cmd.Stdin = strings.NewReader("what is read\n")
			var out, errOut bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errOut
			if code := exitCode(cmd.Run()); code != 42 || out.String() != "what is read\n" || !strings.HasPrefix(errOut.String(), "problem\n") {
				t.Errorf("%s: exit code %d, output %q, error output %q", caller, code, out.String(), errOut.String())
			}
			_, got := recorded(t)
			checkHeader(t, got.header, caller, recordedSession{lab.Pod, "exec", "sh -c cat; echo problem >&2; exit 42"})
			if got.output != "what is read\nproblem\n" && got.output != "problem\nwhat is read\n" {
				t.Errorf("%s: recorded %q", caller, got.output)
			}
		}
	})
}

func TestRecording_OfAttach(t *testing.T) {
	const pod = "attached-recorded"
	runPod(t, pod, `while read -r line; do echo "heard $line"; done`)
	forEachProtocol(t, func(t *testing.T, p protocol) {
		useRecorder(t, recordertest.V2)
		s := startKubectl(t, theLab.Callers["gus"].Kubeconfig, p.env, "attach", "-i", pod)
		for _, word := range []string{"one", "two"} {
			s.say(t, word)
			if got := s.line(t); got != "heard "+word {
				t.Fatalf("kubectl attach printed %q; want %q", got, "heard "+word)
			}
		}
		s.stop()
		_, got := recorded(t)
		checkHeader(t, got.header, "gus", recordedSession{pod, "attach", ""})
		if want := "heard one\nheard two\n"; got.output != want {
			t.Errorf("recorded %q; want %q", got.output, want)
		}
	})
}

// If a session has to be recorded and cannot be, nothing runs.
func TestRecording_EnforcedSessionDoesNotRunWithoutRecorder(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			useRecorder(t, recordertest.V2)
			file := filepath.Join(t.TempDir(), "ran")
			began := time.Now()
			stdout, stderr, err := runKubectl(t, theLab.Callers["hal"].Kubeconfig, p.env, "exec", lab.Pod, "--", "touch", file)
			took := time.Since(began)
			if exitCode(err) != 1 || stdout != "" {
				t.Errorf("exit code %d, output %q; want 1 and no output", exitCode(err), stdout)
			}
			if !strings.Contains(stderr, "the session has to be recorded, and no recorder can be reached") {
				t.Errorf("kubectl printed %q; want the reason", stderr)
			}
			if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the command ran: %v", err)
			}
			t.Logf("kubectl took %.1f s and printed %s", took.Seconds(), stderr)
			if took > 5*time.Second+2*time.Second {
				t.Errorf("kubectl took %v; want less", took)
			}
		})
	}
}

// The API server runs a command before it has read the request's body, and answers
// after that. A client that never sent the body could run a command without a
// recording. Go's server also delays the refusal, but the command is refused all the
// same.
func TestRecording_RequestWithUnsentBodyDoesNotRun(t *testing.T) {
	useRecorder(t, recordertest.V2)
	file := filepath.Join(t.TempDir(), "ran")
	log := tail(t, theLab.Log("caddy"))
	conn := dial(t, theLab.Callers["gus"].Server, lab.ProxyName+":80")
	if _, err := io.WriteString(conn, get("/api/v1/namespaces/default/pods/"+lab.Pod+"/exec?stdout=true&command=touch&command="+file,
		"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Protocol: v4.channel.k8s.io",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "Content-Length: 1")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the request is refused", func() error {
		if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("the command ran: %v", err)
		}
		for _, line := range log.lines(t) {
			if strings.Contains(line, "request refused") && strings.Contains(line, "exec with a body in the request cannot be recorded") {
				return nil
			}
		}
		return errors.New("no such line in the log")
	})
	if _, err := io.WriteString(conn, "x"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := os.Stat(file); resp.StatusCode != http.StatusBadRequest || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %s; file of the command: %v; want 400 and no file", resp.Status, err)
	}
}

// A command starts before its client is answered. Whenever the client disconnects,
// every command that ran has a recording.
func TestRecording_OfClientThatLeavesEarly(t *testing.T) {
	useRecorder(t, recordertest.V2)
	dir := t.TempDir()
	for i := range 40 {
		conn := dial(t, theLab.Callers["gus"].Server, lab.ProxyName+":80")
		if _, err := io.WriteString(conn, get(fmt.Sprintf("/api/v1/namespaces/default/pods/%s/exec?stdout=true&command=touch&command=%s/%d", lab.Pod, dir, i),
			"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Protocol: v4.channel.k8s.io",
			"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * time.Millisecond) // a different time in each round
		_ = conn.Close()
	}
	named := make(map[string]string)
	var ran []os.DirEntry
	eventually(t, "every command that ran is recorded", func() error {
		for _, r := range sessions.Take() {
			select {
			case <-r.Ended():
			case <-time.After(10 * time.Second):
				t.Fatal("a recording did not end")
			}
			if b := r.Bytes(); len(b) > 0 {
				c := parseCast(t, b)
				named[c.header.Command] = c.header.SrcNodeUser
			}
		}
		var err error
		if ran, err = os.ReadDir(dir); err != nil {
			return err
		}
		if len(ran) == 0 {
			return errors.New("no command has run")
		}
		for _, file := range ran {
			if command := "touch " + filepath.Join(dir, file.Name()); named[command] != "gus@example.com" {
				return fmt.Errorf("%q ran; the recordings name %q", command, named)
			}
		}
		return nil
	})
	t.Logf("%d of 40 commands ran, and %d are recorded", len(ran), len(named))
}

func TestRecording_OptionalSessionRunsWithoutRecorder(t *testing.T) {
	for _, p := range protocols {
		t.Run(p.name, func(t *testing.T) {
			useRecorder(t, recordertest.V2)
			stdout, stderr, err := runKubectl(t, theLab.Callers["ida"].Kubeconfig, p.env, "exec", lab.Pod, "--", "echo", "done")
			if err != nil || stdout != "done\n" {
				t.Errorf("got %q, %v: %s", stdout, err, stderr)
			}
		})
	}
}

// When a recorder is lost, a session that has to be recorded ends with the reason.
// Other sessions continue.
func TestRecording_LostRecorderEndsEnforcedSession(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		useRecorder(t, recordertest.V2)
		gus := startKubectl(t, theLab.Callers["gus"].Kubeconfig, p.env, "exec", "-i", lab.Pod, "--", "cat")
		fay := startKubectl(t, theLab.Callers["fay"].Kubeconfig, p.env, "exec", "-i", lab.Pod, "--", "cat")
		gus.echoes(t, "before")
		fay.echoes(t, "before")
		sessions.Cut()
		select {
		case <-gus.ended:
		case <-time.After(10 * time.Second):
			t.Fatal("the session continues; want it to end")
		}
		if want := "this session has to be recorded, and its recorder was lost"; !strings.Contains(gus.stderr.String(), want) || exitCode(gus.err) == 0 {
			t.Errorf("kubectl exited with %d and printed %q; want %q", exitCode(gus.err), gus.stderr.String(), want)
		}
		t.Logf("kubectl printed %q", gus.stderr.String())
		fay.echoes(t, "after")
	})
}

// A port-forward cannot be played back; the log records its beginning and end.
func TestRecording_PortForwardIsLogged(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		useRecorder(t, recordertest.V2)
		log := tail(t, theLab.Log("caddy"))
		port := pageServer(t, 100000)
		s := startKubectl(t, theLab.Callers["gus"].Kubeconfig, p.env, "port-forward", lab.Pod, ":"+port)
		_, local, _ := strings.Cut(s.want(t, "Forwarding from 127.0.0.1:"), "127.0.0.1:")
		local, _, _ = strings.Cut(local, " ")
		resp, err := http.Get("http://127.0.0.1:" + local)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(resp.Body); err != nil || len(body) != 100000 {
			t.Fatalf("%d bytes arrived: %v", len(body), err)
		}
		_ = resp.Body.Close()
		s.stop()
		var began, ended map[string]any
		eventually(t, "Caddy logs the port-forward", func() error {
			for _, line := range log.lines(t) {
				var entry map[string]any
				if json.Unmarshal([]byte(line), &entry) != nil {
					continue
				}
				switch entry["msg"] {
				case "port-forward begins":
					began = entry
				case "port-forward has ended":
					ended = entry
				}
			}
			if began == nil || ended == nil {
				return errors.New("no such lines")
			}
			return nil
		})
		want := map[string]any{"user": "gus@example.com", "node": "gus." + lab.Domain, "namespace": "default", "pod": lab.Pod, "ports": []any{port}}
		got := make(map[string]any)
		for key := range want {
			got[key] = ended[key]
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("logged fields (-want +got):\n%s", diff)
		}
		if began["session"] != ended["session"] || ended["bytes_received"].(float64) < 100000 || ended["bytes_sent"].(float64) < 50 || ended["bytes_sent"].(float64) > 5000 {
			t.Errorf("logged %v and %v", began, ended)
		}
	})
}

// pageServer returns a port of [lab.Pod] that serves a page of that size.
func pageServer(t *testing.T, size int) (port string) {
	t.Helper()
	if theLab.Cluster.Node() != nil {
		// The server stays as long as the pod: the second one fails.
		const script = `mkdir -p /www && yes | head -c "$1" > /www/index.html && { httpd -p 8080 -h /www || wget -q -O /dev/null http://127.0.0.1:8080; }`
		if _, stderr, err := runKubectl(t, theLab.AdminKubeconfig(), nil, "exec", lab.Pod, "--", "sh", "-c", script, "sh", fmt.Sprint(size)); err != nil {
			t.Fatalf("%v: %s", err, stderr)
		}
		return "8080"
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, strings.Repeat("x", size))
	}))
	t.Cleanup(server.Close)
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// The cost of a session of 50 MB, with and without a recorder.
func TestRecording_Of50MB(t *testing.T) {
	const size = 50 << 20
	forEachProtocol(t, func(t *testing.T, p protocol) {
		useRecorder(t, recordertest.V2)
		for _, caller := range []string{"alice", "gus"} {
			var before, after syscall.Rusage
			if err := syscall.Getrusage(syscall.RUSAGE_SELF, &before); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			// The command waits until all output has arrived: see TestStream_PipeLosesNoByte.
			complete := filepath.Join(t.TempDir(), "complete")
			cmd := kubectlAs(t, caller, p, "exec", lab.Pod, "--", "sh", "-c",
				fmt.Sprintf(`yes 'forty-one letters of text, and a line end' | head -c %d; until [ -e "$1" ]; do sleep 0.1; done`, size), "sh", complete)
			got := &counter{want: size, complete: func() error { return os.WriteFile(complete, nil, 0o600) }}
			cmd.Stdout = got
			if err := cmd.Run(); err != nil || got.n != size {
				t.Fatalf("%s: %d bytes: %v", caller, got.n, err)
			}
			took := time.Since(began)
			if err := syscall.Getrusage(syscall.RUSAGE_SELF, &after); err != nil {
				t.Fatal(err)
			}
			cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
			t.Logf("%s: %s: %.1f s, %.1f MB/s, %.1f s of CPU in the process that runs everything but kubectl, the API server and Headscale", p.name, caller, took.Seconds(), size/took.Seconds()/1e6, cpu.Seconds())
			if caller == "gus" {
				if _, cast := recorded(t); len(cast.output) != size {
					t.Errorf("recorded %d bytes; want %d", len(cast.output), size)
				}
			}
		}
	})
}

// Data piped through a recorded session comes back unchanged, to its last byte, and
// is in the recording.
func TestRecording_PipeLosesNoByte(t *testing.T) {
	var text bytes.Buffer
	for i := 0; text.Len() < 5<<20; i++ {
		fmt.Fprintf(&text, "line %d, with ünïcode 日本\n", i)
	}
	forEachProtocol(t, func(t *testing.T, p protocol) {
		useRecorder(t, recordertest.V2)
		for range 3 {
			cmd := kubectlAs(t, "gus", p, "exec", "-i", lab.Pod, "--", "cat")
			cmd.Stdin = bytes.NewReader(text.Bytes())
			var out bytes.Buffer
			cmd.Stdout = &out
			if err := cmd.Run(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(out.Bytes(), text.Bytes()) {
				t.Errorf("%d bytes came back, which differ from the %d that were sent", out.Len(), text.Len())
			}
			if _, got := recorded(t); got.output != text.String() {
				t.Errorf("recorded %d bytes, which differ", len(got.output))
			}
		}
	})
}

// A site that records to files records every caller.
func TestRecording_ToFiles(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		kubeconfig := theLab.Callers["alice"].Kubeconfig + ".files"
		if err := theLab.Callers["alice"].WriteKubeconfig(kubeconfig, "http://"+lab.ProxyName+":"+portFiles); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(recordings(theLab)); err != nil {
			t.Fatal(err)
		}
		stdout, stderr, err := runKubectl(t, kubeconfig, p.env, "exec", lab.Pod, "--", "echo", "kept")
		if err != nil || stdout != "kept\n" {
			t.Fatalf("got %q, %v: %s", stdout, err, stderr)
		}
		eventually(t, "a recording file exists", func() error {
			files, err := filepath.Glob(filepath.Join(recordings(theLab), "*.cast"))
			if err != nil || len(files) != 1 {
				return fmt.Errorf("got files %q", files)
			}
			b, err := os.ReadFile(files[0])
			if err != nil {
				return err
			}
			got := parseCast(t, b)
			checkHeader(t, got.header, "alice", recordedSession{lab.Pod, "exec", "echo kept"})
			if got.output != "kept\n" {
				t.Errorf("recorded %q", got.output)
			}
			return nil
		})
	})
}

// playing is what a recording shows when it is played.
type playing struct {
	Version       int
	Width, Height int
	Lines         []string // of the terminal at the end
}

// play plays a recording with asciinema's parser and terminal.
func play(t *testing.T, recording []byte) (p playing) {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	tool := filepath.Join(root, "lab", "tools", "asciicast")
	if _, err := os.Stat(filepath.Join(tool, "node_modules")); err != nil {
		t.Skip("asciinema's parser is not installed; run `make asciicast`")
	}
	file := filepath.Join(t.TempDir(), "session.cast")
	if err := os.WriteFile(file, recording, 0o600); err != nil {
		t.Fatal(err)
	}
	output, err := exec.Command("node", filepath.Join(tool, "screen.mjs"), file).CombinedOutput()
	if err != nil {
		t.Fatalf("playing the recording: %v: %s\n%s", err, output, recording)
	}
	if err := json.Unmarshal(output, &p); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	return p
}

// asciinema's parser reads recordings, and its terminal shows what the user saw.
func TestRecording_PlaysInAsciinema(t *testing.T) {
	play(t, []byte(`{"version":2,"width":80,"height":24}`+"\n"+`[0, "o", "x"]`+"\n")) // skips the test early if asciinema is missing
	forEachProtocol(t, func(t *testing.T, p protocol) {
		useRecorder(t, recordertest.V2)
		// Colours, an overwritten line, characters of two and three bytes.
		const script = `printf '\033[1;31mred\033[0m\r\n'; printf 'overwritten\rkept       \r\n'; echo grüße 日本; read -r line; stty size; read -r line`
		cmd := kubectlAs(t, "gus", p, "exec", "-it", lab.Pod, "--", "sh", "-c", script)
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
			enter := func() {
				if _, err := io.WriteString(terminal, "\r"); err != nil {
					t.Fatal(err)
				}
			}
			shows("日本")
			if err := pty.Setsize(terminal, &pty.Winsize{Rows: 30, Cols: 90}); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the new size has arrived", func() error {
				for _, r := range sessions.Peek() {
					if strings.Contains(string(r.Bytes()), "90x30") {
						return nil
					}
				}
				return errors.New("not in a recording")
			})
			enter()
			shows("30 90")
			enter()
		})
		recording, _ := recorded(t)
		got := play(t, recording.Bytes())
		want := playing{2, 100, 30, []string{"red", "kept", "grüße 日本", "", "30 90"}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("played recording (-want +got):\n%s", diff)
		}
	})
	// Without a terminal.
	useRecorder(t, recordertest.V1)
	if _, stderr, err := runKubectl(t, theLab.Callers["gus"].Kubeconfig, nil, "exec", lab.Pod, "--", "printf", "a\tb"); err != nil {
		t.Fatalf("%v: %s", err, stderr)
	}
	recording, _ := recorded(t)
	if diff := cmp.Diff(playing{2, 80, 24, []string{"a       b"}}, play(t, recording.Bytes())); diff != "" {
		t.Errorf("played recording (-want +got):\n%s", diff)
	}
}

// The code blocks of docs/recording.md work as they are.
func TestRecording_DocsWork(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	docs, err := os.ReadFile(filepath.Join(root, "docs", "recording.md"))
	if err != nil {
		t.Fatal(err)
	}
	used := make(map[string]int)
	for _, block := range blocks(t, string(docs)) {
		used[block.language]++
		switch block.language {
		case "caddyfile":
			validate(t, block.content)
		case "hujson":
			if err := theLab.Headscale.SetPolicy(t.Context(), []byte(block.content)); err != nil {
				t.Errorf("the policy file: %v", err)
			}
			if err := theLab.Headscale.SetPolicy(t.Context(), theLab.Policy); err != nil {
				t.Fatal(err)
			}
		default:
			t.Errorf("a block of language %q is not tested", block.language)
		}
	}
	if used["caddyfile"] != 1 || used["hujson"] != 1 {
		t.Errorf("got blocks %v; want one of each", used)
	}
}
