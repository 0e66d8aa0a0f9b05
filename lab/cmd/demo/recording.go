// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/recorder"
)

// lastLines is how many lines of the recording are shown.
const lastLines = 3

// showRecording runs a command in a pod as alice while her grants require a
// recorder, shows the end of what the recorder received, and shows the error when
// the recorder fails. It restores the policy.
func showRecording(ctx context.Context, l *lab.Lab) (err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	r, err := recorder.Start(ctx, l)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Stop()) }()
	policy, err := recorder.Grant{Login: "alice@example.com", Group: "system:masters", Recorder: r.Addr.String(), Enforce: true}.AddTo(l.Policy)
	if err != nil {
		return err
	}
	if err := l.Headscale.SetPolicy(ctx, policy); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Headscale.SetPolicy(context.WithoutCancel(ctx), l.Policy)) }()

	// A process that is a pod has this machine's name, which concerns nobody.
	script := "echo 'this shell is recorded'; hostname | sed 's/^/in pod /'; echo 'bye'"
	if l.Cluster.Node() == nil {
		script = "echo 'this shell is recorded'; pwd | sed 's/.*/an empty folder/'; echo 'bye'"
	}
	// Until the proxy's node has the new policy, sessions are not recorded.
	var taken []*recordertest.Recording
	for len(taken) == 0 {
		if _, err := execAs(ctx, l, "alice", script); err != nil {
			return err
		}
		taken = r.Take()
	}
	<-taken[0].Ended()
	fmt.Println("\nAlice's grants now set enforceRecorder. What the recorder on the tailnet received of her kubectl exec:")
	if err := playBack(taken[0].Bytes()); err != nil {
		return err
	}

	r.SetMode(recordertest.Failing)
	output, err := execAs(ctx, l, "alice", "echo 'this does not run'")
	var failed *exec.ExitError
	if !errors.As(err, &failed) {
		return fmt.Errorf("kubectl exec succeeded without the recorder: %w", err)
	}
	fmt.Printf("\nWhen the recorder fails, nothing runs, and kubectl says:\n\n\t%s\n", strings.TrimSpace(output))
	return nil
}

// execAs runs a script in the pod as a caller and returns kubectl's output.
func execAs(ctx context.Context, l *lab.Lab, caller, script string) (string, error) {
	cmd, err := l.Callers[caller].Kubectl(ctx, "exec", lab.Pod, "--", "sh", "-c", script)
	if err != nil {
		return "", err
	}
	output, err := cmd.CombinedOutput()
	return string(output), err
}

// playBack prints the last lines of a recording.
func playBack(recording []byte) error {
	first, events, _ := bytes.Cut(recording, []byte("\n"))
	var header sessionrecording.CastHeader
	if err := json.Unmarshal(first, &header); err != nil {
		return fmt.Errorf("reading the recording: %w", err)
	}
	fmt.Printf("\n\t%s from %s, in %s/%s at %s\n", header.SrcNodeUser, header.SrcNode,
		header.Kubernetes.Namespace, header.Kubernetes.PodName, time.Unix(header.Timestamp, 0).Format(time.TimeOnly))
	var output strings.Builder
	for line := range bytes.Lines(events) {
		var event [3]any
		if err := json.Unmarshal(line, &event); err != nil {
			return fmt.Errorf("reading the recording: %w", err)
		}
		if data, ok := event[2].(string); ok && event[1] == "o" {
			output.WriteString(data)
		}
	}
	lines := strings.Split(strings.TrimSpace(output.String()), "\n")
	for _, line := range lines[max(0, len(lines)-lastLines):] {
		fmt.Println("\t|", line)
	}
	return nil
}
