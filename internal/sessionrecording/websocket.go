// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
)

// webSocket is a WebSocket (RFC 6455). Every message starts with the number of a channel.
type webSocket struct {
	whole  bool // messages have no channel, and are one stream
	base64 bool // messages are text: a digit and base64
	input  bool // the observer receives what the client sends to the pod
	closes bool // the client can close a channel with a message
	status bool // errors are reported as a Status
	// channel returns what a channel carries, and whether it exists.
	channel func(number byte) (stream, bool)
	// out is the channel for the text of the farewell, errors that for its Status. Either
	// may be noChannel.
	out, errors byte

	observer observer
	client   message
	server   message
}

// message is the state of the message whose frames are arriving.
type message struct {
	unfinished bool
	begun      bool // stream is set
	stream     stream
}

const (
	opContinuation = 0
	opText         = 1
	opBinary       = 2
	opClose        = 8
	opPing         = 9
	opPong         = 10

	// closeChannel is the number in messages that close a channel.
	closeChannel = 255
	noChannel    = closeChannel

	// What the channels of exec and attach carry.
	stdin  stream = "stdin"
	stdout stream = "stdout"
	stderr stream = "stderr"
	errs   stream = "error"
	resize stream = "resize"

	// closing carries the numbers of channels that the client closes.
	closing stream = "closing"
)

// sessionChannels are the channels of exec and attach.
func sessionChannels(number byte) (stream, bool) {
	streams := [...]stream{stdin, stdout, stderr, errs, resize}
	if int(number) >= len(streams) {
		return "", false
	}
	return streams[number], true
}

// wsFrame is a frame of a WebSocket.
type wsFrame struct {
	final  bool
	opcode byte
	mask   []byte // nil if there is none
	data   []byte // still masked
	length int    // of the frame
}

// parseWSFrame returns the frame at the start of b, with length 0 if b does not hold
// all of it.
func parseWSFrame(b []byte) (f wsFrame, err error) {
	if len(b) < 2 {
		return f, nil
	}
	if b[0]&0x70 != 0 {
		return f, errors.New("a WebSocket frame with bits that are reserved for extensions")
	}
	f.final, f.opcode = b[0]&0x80 != 0, b[0]&0x0f
	masked := b[1]&0x80 != 0
	size := uint64(b[1] & 0x7f)
	header := 2
	switch size {
	case 126:
		header += 2
		if len(b) < header {
			return f, nil
		}
		size = uint64(binary.BigEndian.Uint16(b[2:]))
	case 127:
		header += 8
		if len(b) < header {
			return f, nil
		}
		size = binary.BigEndian.Uint64(b[2:])
	}
	if f.opcode >= opClose && (!f.final || size > 125) {
		return f, errors.New("a WebSocket control frame that is too long or not the last of its message")
	}
	if err := checkSize(size); err != nil {
		return f, err
	}
	if masked {
		header += 4
	}
	if uint64(len(b)) < uint64(header)+size {
		return f, nil
	}
	if masked {
		f.mask = b[header-4 : header]
	}
	f.length = header + int(size)
	f.data = b[header:f.length]
	return f, nil
}

// unmasked returns a copy of a frame's data from the given offset on.
func (f *wsFrame) unmasked(offset int) []byte {
	data := make([]byte, len(f.data)-offset)
	for i := range data {
		data[i] = f.data[offset+i] ^ f.mask[(offset+i)&3]
	}
	return data
}

// next parses the frame at the start of b and updates the state of its message. It returns
// where in the frame's data the data of the stream begins, -1 if the frame has none.
func (w *webSocket) next(m *message, b []byte, fromClient bool) (f wsFrame, offset int, err error) {
	f, err = parseWSFrame(b)
	if err != nil || f.length == 0 {
		return f, -1, err
	}
	if (f.mask != nil) != fromClient {
		return f, -1, errors.New("a WebSocket frame that is masked although it must not be, or the reverse")
	}
	switch f.opcode {
	case opClose, opPing, opPong:
		return f, -1, nil
	}
	// Kubernetes treats each frame as a message.
	if fromClient && !w.whole && (!f.final || f.opcode == opContinuation) {
		return f, -1, errors.New("a WebSocket message that is sent in parts")
	}
	switch f.opcode {
	case opContinuation:
		if !m.unfinished {
			return f, -1, errors.New("a WebSocket frame that continues no message")
		}
		if w.base64 {
			return f, -1, errors.New("a message in base64 that is sent in parts")
		}
	case opText, opBinary:
		if m.unfinished {
			return f, -1, errors.New("a WebSocket message within another")
		}
		*m = message{begun: w.whole}
	default:
		return f, -1, fmt.Errorf("a WebSocket frame with the unknown opcode %d", f.opcode)
	}
	m.unfinished = !f.final
	switch {
	case len(f.data) == 0:
		return f, -1, nil
	case m.begun:
		return f, 0, nil
	}
	// The first byte of a message is the number of its channel.
	number := f.data[0]
	if f.mask != nil {
		number ^= f.mask[0]
	}
	m.begun = true
	if fromClient && w.closes && number == closeChannel {
		m.stream = closing // the API server ignores all but the number
		return f, 1, nil
	}
	if w.base64 {
		number -= '0'
	}
	var known bool
	if m.stream, known = w.channel(number); !known {
		return f, -1, fmt.Errorf("data on the unknown channel %d", number)
	}
	return f, 1, nil
}

func (w *webSocket) fromClient(b []byte) (int, error) {
	f, offset, err := w.next(&w.client, b, true)
	if err != nil || offset < 0 || w.client.stream == closing || w.client.stream == stdin && !w.input {
		return f.length, err
	}
	data, err := w.decode(f.unmasked(offset))
	if err != nil {
		return 0, err
	}
	return f.length, w.observer.fromClient(w.client.stream, data)
}

func (w *webSocket) fromServer(b []byte) (int, error) {
	f, offset, err := w.next(&w.server, b, false)
	if err != nil || offset < 0 {
		return f.length, err
	}
	data, err := w.decode(f.data[offset:])
	if err != nil {
		return 0, err
	}
	return f.length, w.observer.fromServer(w.server.stream, data)
}

// decode decodes data if messages are in base64.
func (w *webSocket) decode(data []byte) ([]byte, error) {
	if !w.base64 {
		return data, nil
	}
	decoded := make([]byte, base64.StdEncoding.DecodedLen(len(data)))
	n, err := base64.StdEncoding.Decode(decoded, data)
	if err != nil {
		return nil, fmt.Errorf("a message that is not base64: %w", err)
	}
	return decoded[:n], nil
}

func (w *webSocket) farewell(reason string) []byte {
	var b []byte
	if w.server.unfinished {
		// Only the rest of the message may follow, so the client is told nothing.
		return nil
	}
	if w.out != noChannel {
		b = w.message(b, w.out, onTerminal(reason))
	}
	if w.errors != noChannel {
		b = w.message(b, w.errors, onErrorStream(reason, w.status))
	}
	return append(b, 0x80|opClose, 2, 1000>>8, 1000&0xff) // a normal end, so that the client prints what was sent
}

// message appends a message on a channel to b.
func (w *webSocket) message(b []byte, channel byte, data []byte) []byte {
	payload, opcode := append([]byte{channel}, data...), byte(opBinary)
	if w.base64 {
		payload, opcode = append([]byte{'0' + channel}, base64.StdEncoding.EncodeToString(data)...), opText
	}
	b = append(b, 0x80|opcode)
	if size := len(payload); size < 126 {
		b = append(b, byte(size))
	} else {
		b = append(b, 126, byte(size>>8&0xff), byte(size&0xff)) // shorter than 64 KiB
	}
	return append(b, payload...)
}
